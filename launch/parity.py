"""What a launcher starts on every rank (deepspeed, torchrun, srun, mpirun, or none): `megagpt parity`."""

import sys

from megagpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["parity", *sys.argv[1:]]))
