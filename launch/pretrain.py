"""What a launcher starts on every rank (deepspeed, torchrun, srun, mpirun, or none): `megagpt train`."""

import sys

from megagpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
