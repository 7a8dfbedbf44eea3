"""`python -m megagpt` is `megagpt`."""

import sys

from megagpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
