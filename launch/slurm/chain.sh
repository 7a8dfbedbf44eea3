#!/usr/bin/env bash
# A chain of N jobs, for clusters where a job may not requeue itself, or to limit their number. From the same folder:
#   bash launch/slurm/chain.sh N [option of sbatch …] launch/slurm/srun.sbatch launch/recipes/R.yaml ds_configs/D.json
# A job starts when the previous one has ended before the run is done: saved, failed, or out of time. Once the run is
# done, SLURM cancels the remaining jobs.
set -euo pipefail
[ $# -ge 4 ] || { sed -n '2,5s/^# //p' "$0"; exit 2; }
for _ in $(seq "$1"); do
  job=$(sbatch --parsable --no-requeue --kill-on-invalid-dep=yes ${before:+--dependency="afternotok$before"} "${@:2}")
  job=${job%%;*} before=${before-}:${job%%;*} # all previous jobs: a canceled job counts as failed
  echo "$job"
done
