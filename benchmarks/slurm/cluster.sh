#!/usr/bin/env bash
# A SLURM cluster with a controller and two nodes on a single machine, to try plans: no systemd, all state in FOLDER.
#
#   benchmarks/slurm/cluster.sh start FOLDER    needs root and Debian's packages slurm-wlm and munge
#                                               (creates /etc/slurm/slurm.conf, which sbatch and Snakemake read)
#   benchmarks/slurm/cluster.sh status FOLDER   lists nodes, and jobs with their nodes
#   benchmarks/slurm/cluster.sh kill FOLDER n1  kills a node and everything that runs on it
#   benchmarks/slurm/cluster.sh revive FOLDER n1
#   benchmarks/slurm/cluster.sh stop FOLDER
set -euo pipefail

NODES=(n1 n2)
command=${1:?start, status, kill, revive or stop} folder=$(realpath -m "${2:?the folder of the state}") node=${3:-}
# Not set by an environment variable, because Snakemake removes SLURM's variables, as if they came from an outer job.
config=/etc/slurm/slurm.conf

fail() {
    echo "cluster.sh: $1" >&2
    exit 1
}

wait_for() { # SECONDS WHAT COMMAND...
    local seconds=$1 remaining=$1 what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        ((remaining-- > 0)) || fail "$what: not ready after $seconds s; logs are in $folder"
        sleep 1
    done
}

configure() {
    local host cores memory
    host=$(hostname -s) cores=$(nproc) memory=$(awk '/MemTotal/ {print int($2 / 1024 / 2.2)}' /proc/meminfo)
    # Both nodes have all cores of the machine, but each has only its share of the memory.
    [[ ! -e $config || $(readlink $config) == "$folder/slurm.conf" ]] || fail "$config exists: this machine has a cluster"
    cat >"$folder/slurm.conf" <<EOF
ClusterName=toy
SlurmctldHost=$host
SlurmctldPort=16817
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
# Detect a dead node and move its jobs within seconds; keep ended jobs visible to squeue.
SlurmdTimeout=10
ReturnToService=2
JobRequeue=1
MinJobAge=3600
SchedulerParameters=sched_interval=2
NodeName=n1 NodeHostname=$host Port=16821 CPUs=$cores RealMemory=$memory
NodeName=n2 NodeHostname=$host Port=16822 CPUs=$cores RealMemory=$memory
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
EOF
    mkdir -p "${config%/*}"
    ln -sf "$folder/slurm.conf" $config
}

start_node() {
    mkdir -p "$folder/spool-$1"
    slurmd -N "$1" || fail "slurmd of $1 did not start; see $folder/slurmd-$1.log"
}

node_is_idle() { sinfo -h -n "$1" -o %T | grep -qx idle; }

start() {
    [[ $EUID == 0 ]] || fail "run this script as root"
    for program in munged slurmctld slurmd; do
        command -v $program >/dev/null || fail "$program is missing: apt-get install slurm-wlm munge"
    done
    [[ ! -e $folder/slurmctld.pid ]] || fail "$folder has a running or dead cluster: stop it first"
    mkdir -p "$folder/state"
    chmod 755 "$folder"
    configure
    trap stop_daemons EXIT  # a failed start leaves only its logs behind
    (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munged.seed" 2>"$folder/munged.out" ||
        fail "munged: $(cat "$folder/munged.out")"
    slurmctld || fail "slurmctld did not start; see $folder/slurmctld.log"
    wait_for 20 slurmctld scontrol ping
    for name in "${NODES[@]}"; do start_node "$name"; done
    for name in "${NODES[@]}"; do wait_for 30 "node $name" node_is_idle "$name"; done
    trap - EXIT
    show_nodes
}

show_nodes() { sinfo -h -N -o "%N %T, %c cores, %m MB"; }

status() {
    [[ -e $folder/slurmctld.pid ]] || fail "$folder has no running cluster"
    show_nodes
    squeue -a -t all -S i -o "%i %k %T on %N, %M"
}

kill_node() { # kills the daemon and the processes of its jobs, as a power cut would
    [[ -n $node && -e $folder/slurmd-$node.pid ]] || fail "$folder has no running node ${node:-(none named)}"
    local daemon steps
    daemon=$(cat "$folder/slurmd-$node.pid")
    # Each job has a slurmstepd, which has its own session and contains the job's number in its name.
    steps=$(squeue -h -w "$node" -t R -o %A | while read -r job; do pgrep -f "slurmstepd: \[$job\." || true; done)
    kill -9 "$daemon"
    for step in $steps; do
        # shellcheck disable=SC2046
        kill -9 "$step" $(descendants "$step") 2>/dev/null || true
    done
    rm -f "$folder/slurmd-$node.pid"
    echo "$node is dead"
}

descendants() {
    local child
    for child in $(pgrep -P "$1"); do
        descendants "$child"
        echo "$child"
    done
}

no_jobs() { [[ -z $(squeue -h -t running,completing) ]]; }

ended() { ! kill -0 "$1"; }

stop() {
    if [[ -e $folder/slurmctld.pid ]] && scontrol ping >/dev/null 2>&1; then
        # slurmd does not stop its jobs when it ends, and a dead node never reports that its jobs have ended.
        scancel --state=pending --user=root
        scancel --state=running --user=root
        for _ in {1..20}; do
            no_jobs && break
            sleep 1
        done
    fi
    stop_daemons
}

stop_daemons() {
    local file daemon
    for file in "${NODES[@]/#/slurmd-}" slurmctld munged; do
        file=$folder/$file.pid
        [[ -e $file ]] || continue
        daemon=$(cat "$file")
        kill "$daemon" 2>/dev/null || true
        wait_for 20 "the end of process $daemon ($file)" ended "$daemon"
        rm -f "$file"
    done
    [[ $(readlink $config) != "$folder/slurm.conf" ]] || rm $config
}

case $command in
    start) start ;;
    status) status ;;
    kill) kill_node ;;
    revive) start_node "$node" && wait_for 30 "node $node" node_is_idle "$node" ;;
    stop) stop ;;
    *) fail "unknown command $command: start, status, kill, revive or stop" ;;
esac
