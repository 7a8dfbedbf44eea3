"""Entry point of `python -m megagpt.cli`, which is equivalent to `megagpt`."""

import sys

from megagpt.cli import main

sys.exit(main())
