#!/usr/bin/env bash
# All checks, for people and CI alike: format, lint, types, tests. From a fresh clone it installs into .venv first.
# As root, with apt, it also installs what makes two hosts of this one (tests/cluster). Elsewhere those tests fail, unless
# --allow-missing says that they need not be proven here; the last lines then say what was not.
#   bash tests/run.sh            --full: also the long repeats     anything else goes to pytest: -k schedule
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/install.sh test
bash tests/cluster/install.sh
export PATH=$PWD/.venv/bin:$PATH
# CPU ranks on gloo, one thread each, no compiler; caches stay in this clone
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TORCHDYNAMO_DISABLE=1 TOKENIZERS_PARALLELISM=false
export TORCH_EXTENSIONS_DIR=$PWD/.venv/torch_extensions XDG_CACHE_HOME=$PWD/.venv/cache MPLCONFIGDIR=$PWD/.venv/cache

ruff format --check .
ruff check .
mypy
python -m pytest "$@"
