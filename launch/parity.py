"""Script for launchers (deepspeed, torchrun, srun, mpirun) to start on every rank: the same as `megagpt parity`."""

import sys

from megagpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["parity", *sys.argv[1:]]))
