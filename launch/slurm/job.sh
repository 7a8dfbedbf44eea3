# Functions of the job scripts: what they do before, around and after the ranks.

# begin RECIPE CONFIG [option or key=value …]: set `run` to the run directory, `work` to a folder in it for this job, and
# `train` to the command line of a rank
begin() {
  [ $# -ge 2 ] || { echo "megagpt: give a recipe and a DeepSpeed config: sbatch SCRIPT RECIPE CONFIG [KEY=VALUE …]" >&2; exit 2; }
  run=$(megagpt run-directory "$1" "${@:3}") || exit
  work=$run/jobs/$SLURM_JOB_ID
  train=(launch/pretrain.py --recipe "$1" --deepspeed_config "$2" "${@:3}")
  mkdir -p "$work" && rm -f "$run/STOP" || exit # left by the previous job
  trap 'megagpt stop "$run"' USR1 # sent some time before the time limit: save, and exit with 75
  starting $$
}

# starting PID: the run counts as running from here on, so that a signal is noticed while the ranks are still starting
starting() { megagpt mark-starting "$run" "$1" || exit; }

# ranks COMMAND…: start the ranks, and exit according to the state of the run, because launchers lose exit codes. After
# 75 (saved), requeue the job, unless it was submitted with --no-requeue
ranks() {
  (starting "$BASHPID" && exec "$@") &
  local launcher=$! code
  while kill -0 $launcher 2>/dev/null; do wait $launcher; done # a signal interrupts the wait, but not the ranks
  wait $launcher; code=$?
  echo "the launcher exited with $code"
  while megagpt status "$run" >"$work/status"; code=$?; [ $code -eq 3 ]; do sleep 5; done # it exited before its ranks
  cat "$work/status"
  [ $code -eq 75 ] || exit $code
  local shown
  until shown=$(scontrol show job "$SLURM_JOB_ID"); do sleep 5; done # SLURM's controller may be down temporarily
  case $shown in
    *Requeue=0*) exit 1 ;; # with exit 75, a cluster whose RequeueExit has 75 would requeue even this job
  esac
  scontrol requeue "$SLURM_JOB_ID"
  exit 75
}
