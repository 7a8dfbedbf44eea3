"""A rank that meets the others by its environment, says so, and stays until its standard input is closed."""

import os
import sys
from datetime import timedelta

from megagpt.cluster import from_environment
from megagpt.cluster.rendezvous import rendezvous
from megagpt.errors import UserError

try:
    with rendezvous(from_environment(os.environ), sys.argv[1], timedelta(seconds=float(sys.argv[2]))) as rank:
        print(f"started as rank {rank.rank}", flush=True)
        sys.stdin.read()
except UserError as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
