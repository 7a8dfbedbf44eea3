# Sourced by the job scripts: what happens before, while and after the ranks run.

# begin RECIPE CONFIG [option or key=value …]: sets `run` to the run directory, `work` to a folder in it for this job only,
# and `train` to the command line of a rank
begin() {
  run=$(megagpt run-directory "$1" "${@:3}") || exit
  work=$run/jobs/$SLURM_JOB_ID
  train=(launch/pretrain.py --recipe "$1" --deepspeed_config "$2" "${@:3}")
  mkdir -p "$work" && rm -f "$run/STOP" || exit # left by the previous job
  trap 'megagpt stop "$run"' USR1 # sent before the time limit: save, and exit with 75
  starting $$
}

# starting PID: mark the run as running, so that a signal is handled while the ranks are still starting
starting() { megagpt mark-starting "$run" "$1" || exit; }

# ranks COMMAND…: starts the ranks, and ends the job with the status of the run, since launchers lose exit codes. After 75
# (saved) the job is requeued, unless it was submitted with --no-requeue
ranks() {
  (starting "$BASHPID" && exec "$@") &
  local launcher=$! code
  while kill -0 $launcher 2>/dev/null; do wait $launcher; done # a signal interrupts `wait`, not the ranks
  wait $launcher; code=$?
  echo "the launcher exited with code $code"
  while megagpt status "$run" >"$work/status"; code=$?; [ $code -eq 3 ]; do sleep 5; done # the launcher ended before its ranks
  cat "$work/status"
  [ $code -eq 75 ] || exit $code
  local shown
  until shown=$(scontrol show job "$SLURM_JOB_ID"); do sleep 5; done # SLURM's controller may be down temporarily
  case $shown in
    *Requeue=0*) exit 1 ;; # if RequeueExit includes 75, SLURM would restart this job despite --no-requeue
  esac
  scontrol requeue "$SLURM_JOB_ID"
  exit 75
}
