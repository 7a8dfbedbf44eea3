#!/usr/bin/env bash
# What the tests need of a Debian or Ubuntu beside Python, 90 MB: servers for ssh, SLURM and MPI (none is started or
# enabled), libfaketime for a host whose clock is wrong, and a compiler and headers for DeepSpeed's async_io. What is not there, the tests that need it will say.
set -uo pipefail
export PATH=$PATH:/usr/sbin:/sbin
commands=(ip ssh sshd pdsh slurmctld slurmd sbatch mpirun mpirun.mpich nsenter pgrep c++)
faketime=(/usr/lib/*/faketime/libfaketime.so.1)
[ "$(command -v "${commands[@]}" | wc -l)" -eq ${#commands[@]} ] && [ -e /usr/include/libaio.h ] && [ -e "${faketime[0]}" ] &&
  exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  echo "Packages for the tests are not installed, as this needs root and apt" >&2
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
apt-get update -qq && apt-get install -y -qq --no-install-recommends iproute2 util-linux procps openssh-server \
  openssh-client pdsh slurmctld slurmd slurm-client slurm-wlm-basic-plugins openmpi-bin mpich libaio-dev libfaketime g++ >/dev/null ||
  echo "Packages for the tests could not be installed" >&2
