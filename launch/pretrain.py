"""What a launcher (`deepspeed`, torchrun, srun, mpirun, or none) starts on every rank: `megagpt train`, by another door."""

import sys

from megagpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
