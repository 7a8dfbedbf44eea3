#!/usr/bin/env bash
# Creates .venv in this clone and installs megagpt there, with the given extras: bash launch/install.sh quickstart
#   PYTHON=python3.12          interpreter to use, 3.10 or newer
#   MEGAGPT_TORCH_INDEX=URL    additional package index, for example one with CPU builds of torch
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=${1:-quickstart}
python=${PYTHON:-python3}
torch=torch==2.13.0
gpu=$(nvidia-smi -L 2>/dev/null | head -n 1 || true)
stamp=.venv/installed-$extras
index=(${MEGAGPT_TORCH_INDEX:+--extra-index-url "$MEGAGPT_TORCH_INDEX"})
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CACHE_DIR=$PWD/.venv/cache

fail() { printf 'megagpt: %s\n  do: %s\n' "$1" "$2" >&2; exit 2; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
  fail "Python 3.10 or newer is needed; $python is $("$python" --version 2>&1 || true)" "PYTHON=python3.12 bash $0"
[ "$(cat "$stamp" 2>/dev/null)" = "$(cksum setup.py)" ] && exit 0

SECONDS=0
[ -x .venv/bin/pip ] || "$python" -m venv .venv ||
  fail "the virtual environment .venv could not be created" "install your system's package for Python's venv module"
pip=".venv/bin/python -m pip"
if [ -z "$gpu" ] && ! .venv/bin/python -c 'import torch' 2>/dev/null; then
  # a dry run downloads no wheel and only lists those that would be installed
  if $pip install --quiet --dry-run --ignore-installed --report .venv/plan.json ${index[@]+"${index[@]}"} $torch \
    >/dev/null 2>&1 && grep -q '"name": "nvidia-' .venv/plan.json; then
    echo "No GPU was found, but pip would install a CUDA build of torch: several gigabytes that would not be used."
    echo "To avoid that, stop now (Ctrl-C) and give an index with CPU builds (listed on pytorch.org under 'Get started'):"
    echo "    MEGAGPT_TORCH_INDEX=URL bash $0"
    echo "Continuing with the CUDA build in 10 seconds."
    sleep 10
  fi
fi
echo "Installing into .venv (extras: $extras) …"
$pip install --quiet ${index[@]+"${index[@]}"} $torch numpy
$pip install --quiet --editable ".[$extras]"
if [ -n "$gpu" ] && ! why=$(.venv/bin/python -c 'import torch; (torch.ones(1, device="cuda") + 1).item()' 2>&1); then
  # a wheel of torch is built for one version of CUDA, which needs a driver as new and leaves out old devices
  echo "There is a GPU ($gpu), but torch cannot compute on it: ${why##*$'\n'}"
  .venv/bin/python -c 'import torch; print(f"torch {torch.__version__}, built for CUDA {torch.version.cuda}")'
  nvidia-smi --query-gpu=driver_version,compute_cap --format=csv | sort -u
  fail "this build of torch does not fit the driver or the device" \
    "run MEGAGPT_TORCH_INDEX=URL bash $0 with the index of an older CUDA (listed on pytorch.org under 'Get started'), or install a newer driver"
fi
cksum setup.py >"$stamp"
echo "Installed in ${SECONDS} s."
