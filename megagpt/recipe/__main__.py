"""`python -m megagpt.recipe RECIPE [key=value …]`: its run directory, for scripts that must look into it."""

import sys

from megagpt.errors import UserError
from megagpt.recipe import load

try:
    # a command line of `megagpt train` may be given as it is: its options are left out
    print(load(sys.argv[1], [word for word in sys.argv[2:] if "=" in word and not word.startswith("-")]).run_dir)
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
