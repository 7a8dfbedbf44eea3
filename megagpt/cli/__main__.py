"""Entry point of `python -m megagpt.cli`, the same as `megagpt`."""

import sys

from megagpt.cli import main

sys.exit(main())
