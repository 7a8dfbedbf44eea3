#!/usr/bin/env bash
# All checks, for people and CI alike: format, lint, types, tests. From a fresh clone it installs into .venv first.
#   bash tests/run.sh            --full: also the long repeats     --allow-missing, and anything else: to pytest
# As root and with apt it installs what the tests need of the system, such as the parts of two hosts (tests/cluster).
# What still cannot be proven here is said in the last lines, and is a failure, unless --allow-missing says it need not be.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tests/install.sh &
bash launch/install.sh test || { code=$?; wait; exit $code; }
wait
export PATH=$PWD/.venv/bin:$PATH
# CPU ranks on gloo, one thread each, no compiler; caches stay in this clone
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TORCHDYNAMO_DISABLE=1 TOKENIZERS_PARALLELISM=false
export TORCH_EXTENSIONS_DIR=$PWD/.venv/torch_extensions XDG_CACHE_HOME=$PWD/.venv/cache MPLCONFIGDIR=$PWD/.venv/cache

ruff format --check .
ruff check .
mypy
# Two processes, a file at a time: about half of the time a test waits for hosts, limits or locks, and leaves a core idle.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
