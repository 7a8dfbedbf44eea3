#!/usr/bin/env bash
# All checks, for people and CI alike: format, lint, types, tests. From a fresh clone it installs into .venv first.
#   bash tests/run.sh            --full: also the long repeats, and two hosts on this one     anything else: to pytest
# With --full, as root and with apt, it installs what makes two hosts (tests/cluster); where it cannot, those tests fail,
# unless --allow-missing says that they need not be proven. The last lines say what was not.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/install.sh test
case " $* " in *" --full "*) bash tests/cluster/install.sh ;; esac
export PATH=$PWD/.venv/bin:$PATH
# CPU ranks on gloo, one thread each, no compiler; caches stay in this clone
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TORCHDYNAMO_DISABLE=1 TOKENIZERS_PARALLELISM=false
export TORCH_EXTENSIONS_DIR=$PWD/.venv/torch_extensions XDG_CACHE_HOME=$PWD/.venv/cache MPLCONFIGDIR=$PWD/.venv/cache

ruff format --check .
ruff check .
mypy
python -m pytest "$@"
