# Read by the job scripts: what is done before the ranks, around them, and after them.

# begin RECIPE CONFIG [option or key=value …]: `run` is the run directory, `work` a folder in it that is this job's alone,
# `train` the command line of a rank
begin() {
  [ $# -ge 2 ] || { echo "megagpt: give a recipe and a DeepSpeed config: sbatch SCRIPT RECIPE CONFIG [KEY=VALUE …]" >&2; exit 2; }
  run=$(megagpt run-directory "$1" "${@:3}") || exit
  work=$run/jobs/$SLURM_JOB_ID
  train=(launch/pretrain.py --recipe "$1" --deepspeed_config "$2" "${@:3}")
  mkdir -p "$work" && rm -f "$run/STOP" || exit # of the job before this one
  trap 'megagpt stop "$run"' USR1 # comes some time before the time limit: save, and end with 75
  starting $$
}

# starting PID: from here on the run counts as running, so that a signal is heard while the ranks still start
starting() { megagpt mark-starting "$run" "$1" || exit; }

# ranks COMMAND…: starts the ranks, and ends the job as the run stands, whatever exit code the launcher has or loses. With
# 75 (saved) the job is put into the queue again, unless it was submitted with --no-requeue
ranks() {
  (starting "$BASHPID" && exec "$@") &
  local launcher=$! code
  while kill -0 $launcher 2>/dev/null; do wait $launcher; done # a signal ends the wait, not the ranks
  wait $launcher; code=$?
  echo "the launcher ended with $code"
  while megagpt status "$run" >"$work/status"; code=$?; [ $code -eq 3 ]; do sleep 5; done # it ended before its ranks
  cat "$work/status"
  [ $code -eq 75 ] || exit $code
  local shown
  until shown=$(scontrol show job "$SLURM_JOB_ID"); do sleep 5; done # SLURM's controller may be down for a while
  case $shown in
    *Requeue=0*) exit 1 ;; # where RequeueExit names 75, it would start even this job again
  esac
  scontrol requeue "$SLURM_JOB_ID"
  exit 75
}
