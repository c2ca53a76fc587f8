#!/usr/bin/env bash
# A Slurm of two nodes on this machine, each in a network of its own, for trying out `lcx launch --backend=slurm`. Needs root, and
# Debian's packages slurmctld, slurmd, slurm-client and munge.
#
#   bash tests/launch/two_nodes.sh up FOLDER      start it; prints what to export
#   bash tests/launch/two_nodes.sh down FOLDER    end it and take its networks away
#
# Nodes a1 and a2 have the addresses 10.77.0.11 and .12 behind the bridge lcx0, the controller (this machine) 10.77.0.1.
set -euo pipefail

folder=$(realpath "$2")
nodes=(a1 a2)

configure() {
    mkdir -p "$folder/state" "$folder/spool-a1" "$folder/spool-a2" "$folder/logs"
    cat > "$folder/slurm.conf" << END
ClusterName=lcx
SlurmctldHost=$(hostname)(10.77.0.1)
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=60
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldLogFile=$folder/logs/slurmctld.log
SlurmdLogFile=$folder/logs/slurmd-%n.log
NodeName=a1 NodeAddr=10.77.0.11 NodeHostname=a1 CPUs=$(nproc)
NodeName=a2 NodeAddr=10.77.0.12 NodeHostname=a2 CPUs=$(nproc)
PartitionName=all Nodes=a1,a2 Default=YES MaxTime=INFINITE State=UP
END
}

up() {
    configure
    ip link add lcx0 type bridge
    ip address add 10.77.0.1/24 dev lcx0
    ip link set lcx0 up
    local i node
    for i in 0 1; do
        node=${nodes[$i]}
        ip netns add "lcx-$node"
        ip link add "lcx-$node" type veth peer name eth0 netns "lcx-$node"
        ip link set "lcx-$node" master lcx0 up
        ip -n "lcx-$node" address add "10.77.0.1$((i + 1))/24" dev eth0
        ip -n "lcx-$node" link set eth0 up
        ip -n "lcx-$node" link set lo up
    done
    printf '127.0.0.1 localhost\n10.77.0.1 control\n10.77.0.11 a1\n10.77.0.12 a2\n' > "$folder/hosts"
    pgrep -x munged > /dev/null || {
        mkdir -p /run/munge
        chown munge: /run/munge
        setpriv --reuid=munge --regid=munge --clear-groups munged
        touch "$folder/munged-is-ours"
    }
    SLURM_CONF=$folder/slurm.conf slurmctld
    for node in "${nodes[@]}"; do
        # The node knows itself and the other by their names. `ip netns exec` would take /sys/fs/cgroup from it, which slurmd needs.
        SLURM_CONF=$folder/slurm.conf nsenter --net="/run/netns/lcx-$node" unshare --uts --mount bash -c \
            "hostname $node && mount --bind $folder/hosts /etc/hosts && exec slurmd -N $node"
    done
    echo "export SLURM_CONF=$folder/slurm.conf"
}

down() {
    local node name
    for name in slurmd-a1 slurmd-a2 slurmctld; do
        if [ -f "$folder/$name.pid" ]; then
            kill "$(cat "$folder/$name.pid")" || true
        fi
    done
    sleep 1
    if [ -f "$folder/munged-is-ours" ]; then
        kill "$(cat /run/munge/munged.pid)" || true
    fi
    for node in "${nodes[@]}"; do
        ip netns delete "lcx-$node" || true
    done
    ip link delete lcx0 || true
}

case "$1" in
    up) up ;;
    down) down ;;
    *)
        echo "usage: $0 up|down FOLDER" >&2
        exit 2
        ;;
esac
