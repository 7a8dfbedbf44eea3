#!/usr/bin/env bash
# From a fresh clone to a GPT that writes English: install, prepare, train, evaluate. Run it again to resume.
#   bash launch/quickstart.sh            writes only into this clone: .venv and runs/quickstart
#   bash launch/quickstart.sh --fresh    deletes runs/quickstart first
#   bash launch/quickstart.sh length.updates=300      overrides a key of launch/recipes/quickstart.yaml
# Every step is printed as the command that you could run yourself. Environment variables: see launch/install.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

run=runs/quickstart data=runs/quickstart/data
overrides=()
for argument in "$@"; do
  case "$argument" in
    --fresh) rm -rf "$run" ;;
    *=*) overrides+=("$argument") ;;
    *) printf 'megagpt: unknown option %s\n  do: bash launch/quickstart.sh [--fresh] [key=value …]\n' "$argument" >&2; exit 2 ;;
  esac
done

bash launch/install.sh quickstart
export PATH=$PWD/.venv/bin:$PATH XDG_CACHE_HOME=$PWD/.venv/cache MPLCONFIGDIR=$PWD/.venv/cache
export TORCH_EXTENSIONS_DIR=$PWD/.venv/torch_extensions OMP_WAIT_POLICY=PASSIVE
# Otherwise glibc returns large blocks to the system and faults them in again in every update: 5 to 15 % of the time.
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_TOP_PAD_=67108864
step() { printf '\n$ %s\n' "$*"; "$@"; }

if [ -e "$run/DONE" ]; then
  echo "$run is done. Try:  .venv/bin/megagpt generate $run --prompt \"The people of the United States\""
  echo "To start from scratch:         bash launch/quickstart.sh --fresh"
  exit 0
fi

[ -e "$data/sotu.model" ] || step megagpt tokenizer train default --vocab-size 4096 --output "$data/sotu"
[ -e "$data/sotu.validation.json" ] || step megagpt prepare default --tokenizer "$data/sotu.model" --output "$data/sotu"

# One rank per GPU, as many as divide the global batch. Without a GPU, two ranks with half of the cores each: on two
# idle cores 15,700 tokens/s, compared with 13,700 for one rank with two threads. With a model of this size, more than
# 4 threads per rank only wait for each other.
batch=$(sed -n 's/^batch: *{global_size: *\([0-9]*\).*/\1/p' launch/recipes/quickstart.yaml)
environment=() devices=() ranks=0
if [ "${DS_ACCELERATOR-cuda}" = cuda ] && { nvidia-smi -L >/dev/null 2>&1 || [ -e /dev/kfd ]; }; then
  ranks=$(python -c 'import torch; print(torch.cuda.device_count())')
fi
if [ "$ranks" -eq 0 ]; then
  cores=$(getconf _NPROCESSORS_ONLN)
  ranks=$((cores < 2 ? 1 : 2)) threads=$((cores / ranks))
  environment=(env OMP_NUM_THREADS=$((threads < 4 ? threads : 4)) DS_ACCELERATOR=cpu)
fi
while [ $((batch % ranks)) -ne 0 ]; do ranks=$((ranks - 1)); done
devices=(--num_accelerators "$ranks")
if [ "${#environment[@]}" -eq 0 ] && [[ ${CUDA_VISIBLE_DEVICES-} =~ ^[0-9] ]]; then # ignored if a number is given
  devices=(--include "localhost:$(cut -d, -f "1-$ranks" <<<"$CUDA_VISIBLE_DEVICES")")
fi
code=0
step ${environment[@]+"${environment[@]}"} deepspeed "${devices[@]}" --master_port "$(megagpt free-port)" \
  --no_local_rank --log_level critical launch/pretrain.py --recipe launch/recipes/quickstart.yaml \
  --deepspeed_config ds_configs/zero0.json ${overrides[@]+"${overrides[@]}"} || code=$?
if [ ! -e "$run/DONE" ]; then
  echo "Training has not finished. To resume from the last checkpoint: bash launch/quickstart.sh"
  exit $((code ? code : 1))
fi

step megagpt report "$run"
step megagpt evaluate "$run" --yardsticks
step megagpt generate "$run" --prompt "The people of the United States" --tokens 150
printf '\nRun directory: %s (loss curve: %s/loss.svg)\n' "$run" "$run"
echo "Next: .venv/bin/megagpt generate $run --prompt \"My fellow citizens\" --tokens 300 --seed 7"
