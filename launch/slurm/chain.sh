#!/usr/bin/env bash
# Submit N jobs that follow each other, for clusters where a job cannot requeue itself. Run in the same folder as sbatch:
#   bash launch/slurm/chain.sh N [option of sbatch …] launch/slurm/srun.sbatch launch/recipes/R.yaml ds_configs/D.json
# A job starts when the one before it ends and the run is not done: saved, failed, or out of time. Once the run is done,
# SLURM cancels the remaining jobs.
set -euo pipefail
[ $# -ge 4 ] || { sed -n '2,5s/^# //p' "$0"; exit 2; }
for _ in $(seq "$1"); do
  job=$(sbatch --parsable --no-requeue --kill-on-invalid-dep=yes ${before:+--dependency="afternotok$before"} "${@:2}")
  job=${job%%;*} before=${before-}:${job%%;*} # depends on all earlier jobs: a cancelled job counts as failed
  echo "$job"
done
