#!/usr/bin/env bash
# A private Slurm of one node, on loopback, without systemd and without touching /etc: for tests and for trying things out.
#
#   eval "$(bash scripts/slurm/start.sh FOLDER [OWNER_PID])"    prints: export SLURM_CONF=FOLDER/slurm.conf
#   bash scripts/slurm/stop.sh FOLDER
#
# Everything (key, socket, configuration, state, logs) lies in FOLDER, whose path must be short (a socket's name holds 107 letters).
# What runs already is left alone and what does not is started, so the same line brings a daemon back. With OWNER_PID everything is
# stopped when that process is gone. The node claims as many processors and as much memory as these variables say:
#   CLUSTER_CPUS (8)   CLUSTER_MEMORY_MB (16000)   CLUSTER_PORT (a free one)   CLUSTER_GPUS (2, pretended: no CUDA behind them)
# Exit 3: Slurm is not installed; 4: it did not come up (the ends of its logs are shown).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:?say where: start.sh FOLDER}
owner=${2:-}
PATH=$PATH:/usr/sbin:/sbin
for needed in sbatch slurmctld slurmd munged; do
  command -v "$needed" >/dev/null || { echo "Slurm is not installed here ($needed is missing): bash scripts/slurm/install.sh" >&2; exit 3; }
done

umask 022
mkdir -p "$folder"/{run,log,state,spool,key}
folder=$(cd "$folder" && pwd)
chmod 700 "$folder/state" "$folder/key"
node=$(hostname -s 2>/dev/null || cat /proc/sys/kernel/hostname)
user=$(id -un)
export SLURM_CONF=$folder/slurm.conf

# Whether the daemon that a pid file names was started from this folder. Not by the executable's name: that may be a link.
alive() {
  local pid
  pid=$(cat "$folder/run/$1.pid" 2>/dev/null) && [ -n "$pid" ] || return 1
  tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF -e "$folder/"
}
free_port() { # two neighbours that nothing listens on
  local port
  for _ in $(seq 50); do
    port=$((20000 + (RANDOM % 20000)))
    if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && ! (exec 3<>"/dev/tcp/127.0.0.1/$((port + 1))") 2>/dev/null; then
      echo "$port"
      return
    fi
  done
  return 1
}

[ -s "$folder/key/munge.key" ] || (umask 077; head -c 128 /dev/urandom >"$folder/key/munge.key")
if [ ! -s "$SLURM_CONF" ]; then
  port=${CLUSTER_PORT:-$(free_port)}
  gpus=${CLUSTER_GPUS:-2} gres_types='' gres='' # character devices stand in for GPUs: plain files would leave CUDA_VISIBLE_DEVICES unset
  : >"$folder/gres.conf"
  if [ "$gpus" -gt 0 ] && [ -c "/dev/tty$gpus" ]; then
    gres_types=GresTypes=gpu gres=Gres=gpu:$gpus
    echo "NodeName=$node Name=gpu File=/dev/tty[1-$gpus]" >"$folder/gres.conf"
  fi
  cat >"$SLURM_CONF.new" <<CONF
ClusterName=seerseg
SlurmctldHost=$node(127.0.0.1)
SlurmUser=$user
SlurmdUser=$user
SlurmctldPort=$port
SlurmdPort=$((port + 1))
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
CredType=cred/munge
# credentials of 10 s instead of 2 minutes: a requeued job starts again that much sooner
AuthInfo=socket=$folder/run/munge.sock,cred_expire=10
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
SchedulerType=sched/builtin
SchedulerParameters=sched_min_interval=100000,sched_interval=2,batch_sched_delay=0,default_queue_depth=1000
PriorityType=priority/basic
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
JobRequeue=1
ReturnToService=2
MinJobAge=300
KillWait=5
SlurmctldTimeout=60
SlurmdTimeout=30
InactiveLimit=0
WaitTime=0
MaxArraySize=1001
$gres_types
NodeName=$node NodeAddr=127.0.0.1 CPUs=${CLUSTER_CPUS:-8} RealMemory=${CLUSTER_MEMORY_MB:-16000} $gres State=UNKNOWN
PartitionName=short Nodes=$node Default=YES MaxTime=2:00:00 State=UP
PartitionName=gpu Nodes=$node MaxTime=INFINITE State=UP
CONF
  mv "$SLURM_CONF.new" "$SLURM_CONF"
fi

cd /
if ! alive munged; then
  rm -f "$folder"/run/munge.sock*
  munged --force --num-threads=2 --key-file="$folder/key/munge.key" --socket="$folder/run/munge.sock" --pid-file="$folder/run/munged.pid" \
    --log-file="$folder/log/munged.log" --seed-file="$folder/key/seed" >/dev/null 2>&1 || { echo "munged does not start here" >&2; exit 4; }
fi
alive slurmctld || slurmctld -f "$SLURM_CONF" >/dev/null 2>&1 || true
for _ in $(seq 200); do scontrol ping 2>/dev/null | grep -q 'is UP' && break; sleep 0.05; done
alive slurmd || slurmd -f "$SLURM_CONF" >/dev/null 2>&1 || true

ready=
for _ in $(seq 150); do
  state=$(sinfo -h -N -o %T 2>/dev/null | head -n 1 || true)
  case "$state" in
    idle | mixed | allocated | completing) if alive slurmd; then ready=1; break; fi ;;
    down* | drain*) scontrol update "nodename=$node" state=resume >/dev/null 2>&1 || true ;;
  esac
  sleep 0.1
done
if [ -z "$ready" ]; then
  echo "The node is not ready (${state:-no answer}). The ends of the logs:" >&2
  tail -n 15 "$folder"/log/*.log >&2 || true
  exit 4
fi
if [ -n "$owner" ] && [ ! -e "$folder/run/watched" ]; then
  : >"$folder/run/watched"
  (while kill -0 "$owner" 2>/dev/null && [ -e "$folder/run/watched" ]; do sleep 5; done
   bash "$here/stop.sh" "$folder") >/dev/null 2>&1 </dev/null &
fi
echo "export SLURM_CONF=$SLURM_CONF"
