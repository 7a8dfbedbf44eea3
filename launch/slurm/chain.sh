# Read by both job scripts: what is done before and after the ranks. A job ends by DONE, not by an exit code, which
# launchers lose; `megagpt status` asks the run directory.

# begin RECIPE CONFIG [option or key=value …]: names the run directory and the command line of a rank, ends at once if
# the run is done, makes a folder for this job
begin() {
  cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
  run=$(python -c 'import sys; from pathlib import Path; from megagpt import recipe
print(recipe.load(Path(sys.argv[1]), [word for word in sys.argv[2:] if "=" in word]).run_dir)' "$1" "${@:3}") || exit 2
  [ -e "$run/DONE" ] && { echo "$run is done"; exit 0; }
  work=$run/jobs/$SLURM_JOB_ID
  mkdir -p "$work" && rm -f "$run/status.json" # of the job before this one
  train=(launch/pretrain.py --recipe "$1" --deepspeed_config "$2" "${@:3}")
}

# end CODE: the job's exit code. 75 requeues this very job, unless the cluster's RequeueExit has done so already
end() {
  megagpt status "$run"
  local code=$?
  [ $code -eq 3 ] && { sleep 60; megagpt status "$run"; code=$?; } # the launcher ended before its ranks
  echo "launcher $1, status $code"
  [ $code -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
  exit $code
}
