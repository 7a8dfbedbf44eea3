#!/usr/bin/env bash
# cluster.sh up N | slurm N | on I CMD… | cut I | heal I | off I | boot I | down | sweep        (hosts are node1…nodeN)
# A cluster belongs to the process CLUSTER_OWNER. What an owner that is dead has left, and nothing else, goes by `sweep`.
set -eu
D=$(realpath -m ${CLUSTER_DIR:?}) P=m${CLUSTER_OWNER:?}x NET=10.77.0        # P: of all that the cluster makes, ≤ 9 letters
up() {
  mkdir -p $D /run/sshd; echo "$P $CLUSTER_OWNER $(born $CLUSTER_OWNER)" > /run/$P.owner; ip link add ${P}br type bridge; ip link set ${P}br up   # no address: nothing but the hosts is on it
  ssh-keygen -q -t ed25519 -N '' -f $D/id; : > $D/known_hosts
  { echo "127.0.0.1 localhost"; for i in $(seq $1); do echo "$NET.$i node$i"; done; } > $D/hosts
  printf '%s\n' "Host node*" "Port 2222" "IdentityFile $D/id" "IdentitiesOnly yes" "UserKnownHostsFile $D/known_hosts" \
    "StrictHostKeyChecking yes" "BatchMode yes" "LogLevel ERROR" > $D/ssh_config
  for i in $(seq $1); do n=$P$i e=/etc/netns/$P$i
    mkdir -p $e/ssh $D/node$i/tmp; cp $D/hosts $e/hosts; echo "hosts: files" > $e/nsswitch.conf; cp $D/ssh_config $e/ssh/
    ssh-keygen -q -t ed25519 -N '' -f $D/node$i/hostkey
    echo "[node$i]:2222,[$NET.$i]:2222 $(cut -d' ' -f1,2 $D/node$i/hostkey.pub)" >> $D/known_hosts
    ip netns add $n; ip link add ${P}v$i type veth peer name eth0 netns $n; ip link set ${P}v$i master ${P}br up
    ip -n $n addr add $NET.$i/24 dev eth0; ip -n $n link set eth0 up; ip -n $n link set lo up
    printf '%s\n' "Port 2222" "ListenAddress $NET.$i" "HostKey $D/node$i/hostkey" "PidFile none" "AuthorizedKeysFile $D/id.pub" \
      "StrictModes no" "PermitRootLogin prohibit-password" "PasswordAuthentication no" "UsePAM no" "UseDNS no" "MaxStartups 100" > $D/node$i/sshd_config
    boot $i
  done
  for i in $(seq $1); do for t in $(seq 300); do on 1 ssh node$i true 2>/dev/null && break; sleep .1; done; done; }
boot() { heal $1; ip netns exec $P$1 unshare --uts --ipc --pid --fork --kill-child --mount-proc sh -c "hostname node$1
  mount -t tmpfs tmpfs /dev/shm; [ -z '${PRIVATE_TMP-}' ] || mount --bind $D/node$1/tmp /tmp
  exec /usr/sbin/sshd -D -e -f $D/node$1/sshd_config" >>$D/node$1/log 2>&1 </dev/null & echo $! > $D/node$1/pid; }
on() { i=$1; shift; ${E-} nsenter -t $(pgrep -P $(cat $D/node$i/pid)) -n -u -m -p -i sh -c 'cd "$1"; shift; exec "$@"' sh "$PWD" "$@"; }
cut_() { ip link set ${P}v$1 down; }
heal() { ip link set ${P}v$1 up; }
off() { cut_ $1; kill -9 $(cat $D/node$1/pid); rm $D/node$1/pid; }   # power cut: link first, so no FIN or RST leaves
slurm() { S=$D/slurm; mkdir -p $S/state; touch $S/gpu0 $S/gpu1; cat > $S/slurm.conf <<X
ClusterName=$P
SlurmctldHost=node1($NET.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation=$S/state
SlurmdSpoolDir=$S/spool.%n
SlurmctldPidFile=$S/slurmctld.pid
SlurmdPidFile=$S/slurmd.%n.pid
SlurmctldLogFile=$S/slurmctld.log
SlurmdLogFile=$S/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc=$S/jobs.log
ReturnToService=2
KillWait=5
SlurmdTimeout=10
RequeueExit=75
DependencyParameters=kill_invalid_depend
SchedulerParameters=batch_sched_delay=0,bf_interval=5
GresTypes=gpu
NodeName=node[1-$1] NodeAddr=$NET.[1-$1] CPUs=4 RealMemory=4000 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE
X
  echo "Name=gpu File=$S/gpu[0-1]" > $S/gres.conf; echo CgroupPlugin=cgroup/v1 > $S/cgroup.conf
  on 1 slurmctld -f $S/slurm.conf; for i in $(seq $1); do on $i slurmd -f $S/slurm.conf -N node$i; done
  for t in $(seq 600); do [ "$(on 1 env SLURM_CONF=$S/slurm.conf sinfo -h -t idle -o %D 2>/dev/null)" = $1 ] && return; sleep .1; done; return 1; }
down() { for n in $(ip netns list | awk '{print $1}' | grep "^$P[0-9]*$"); do
    ip netns pids $n | xargs -r kill -9 2>/dev/null || :; ip netns del $n; rm -rf /etc/netns/$n; done
  ip link del ${P}br 2>/dev/null || :; rm -f /run/$P.owner; }
born() { sed 's/.*) //' /proc/$1/stat 2>/dev/null | cut -d' ' -f20; }   # when a process started, in ticks: ids are used again
sweep() { for o in /run/m*x.owner; do read -r P owner at 2>/dev/null < $o || continue
  [ "$(born $owner)" = "$at" ] || down; done; }
c=$1; shift; [ $c = cut ] && c=cut_; [ $c = on ] && E=exec; $c "$@"
