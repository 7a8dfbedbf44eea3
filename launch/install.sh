#!/usr/bin/env bash
# Makes .venv in this clone and installs megagpt there, with the extras named: bash launch/install.sh quickstart
#   PYTHON=python3.12          another interpreter, 3.10 or newer
#   MEGAGPT_TORCH_INDEX=URL    one more package index, for instance one with CPU builds of torch
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
  fail "no virtual environment could be made" "install your system's package for Python's venv"
pip=".venv/bin/python -m pip"
if [ -z "$gpu" ] && ! .venv/bin/python -c 'import torch' 2>/dev/null; then
  # a dry run downloads no wheel: it only says which ones would be
  if $pip install --quiet --dry-run --ignore-installed --report .venv/plan.json ${index[@]+"${index[@]}"} $torch \
    >/dev/null 2>&1 && grep -q '"name": "nvidia-' .venv/plan.json; then
    echo "No GPU was found here, but pip would take a CUDA build of torch: gigabytes that nothing will use."
    echo "To avoid that, stop now (Ctrl-C) and name an index with CPU builds (pytorch.org, 'Get started', lists it):"
    echo "    MEGAGPT_TORCH_INDEX=URL bash $0"
    echo "Going on with the CUDA build in 10 seconds."
    sleep 10
  fi
fi
echo "Installing into .venv (extras: $extras) …"
$pip install --quiet ${index[@]+"${index[@]}"} $torch numpy
$pip install --quiet --editable ".[$extras]"
if [ -n "$gpu" ] && ! why=$(.venv/bin/python -c 'import torch; (torch.ones(1, device="cuda") + 1).item()' 2>&1); then
  # torch's wheels are built for one CUDA each: it asks for a driver as new, and leaves old devices out
  echo "A GPU is here ($gpu), but torch does not compute on it: ${why##*$'\n'}"
  .venv/bin/python -c 'import torch; print(f"torch {torch.__version__}, built for CUDA {torch.version.cuda}")'
  nvidia-smi --query-gpu=driver_version,compute_cap --format=csv | sort -u
  fail "this build of torch does not fit the driver or the device" \
    "MEGAGPT_TORCH_INDEX=URL bash $0, with the index of an older CUDA (pytorch.org, 'Get started', lists them), or a newer driver"
fi
cksum setup.py >"$stamp"
echo "Installed in ${SECONDS} s."
