"""Entry point of `python -m megagpt`, which is equivalent to `megagpt`."""

import sys

from megagpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
