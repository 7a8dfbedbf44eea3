"""Script for launchers (deepspeed, torchrun, srun, mpirun) to start on every rank: the same as `megagpt train`."""

import sys

from megagpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
