#!/usr/bin/env bash
# N jobs, each after the one before, where a job may not start itself again or should have an end. From the same folder:
#   bash launch/slurm/chain.sh N [option of sbatch …] launch/slurm/srun.sbatch launch/recipes/R.yaml ds_configs/D.json
# A job begins when the one before ended without the run being done: saved, failed, or out of time. Once it is done SLURM
# cancels those that are left.
set -euo pipefail
[ $# -ge 4 ] || { sed -n '2,5s/^# //p' "$0"; exit 2; }
for _ in $(seq "$1"); do
  job=$(sbatch --parsable --no-requeue --kill-on-invalid-dep=yes ${before:+--dependency="afternotok$before"} "${@:2}")
  job=${job%%;*} before=${before-}:${job%%;*} # of all before: a job that was cancelled counts as one that has failed
  echo "$job"
done
