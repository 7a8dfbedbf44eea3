#!/usr/bin/env bash
# What tests/cluster needs of a Debian or Ubuntu: servers for ssh, SLURM and MPI, 60 MB. No service is started or enabled.
set -euo pipefail
[ -x /usr/sbin/sshd ] && [ "$(command -v pdsh slurmctld slurmd sbatch mpirun ip | wc -l)" -eq 6 ] && exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  echo "Not installed, as this needs root and apt: two hosts for tests/cluster" >&2
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
apt-get update -qq
apt-get install -y -qq --no-install-recommends iproute2 openssh-server openssh-client pdsh slurmctld slurmd slurm-client \
  slurm-wlm-basic-plugins openmpi-bin >/dev/null
