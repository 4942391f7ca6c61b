#!/usr/bin/env bash
# Run a vitfreeze command on several nodes by DeepSpeed's launcher. The hostfile has a line 'NAME slots=GPUS' per node.
# Usage, from one node that reaches the others by ssh without a password (needs pdsh):
#   bash launch/multinode.sh --hostfile FILE [--exclude HOST[@HOST]] [--master_port P] COMMAND RECIPE [overrides]
# or on every node itself, without ssh (a scheduler, containers):
#   bash launch/multinode.sh --hostfile FILE --node_rank N --master_addr ADDRESS [--master_port P] COMMAND RECIPE ...
# Ctrl-C saves and stops (status 75); the same command goes on, also with fewer nodes. Prepare: launch/README.md.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
    sed -n '2,7s/^# //p' "${BASH_SOURCE[0]}" >&2
    exit 2
}

refuse() {
    echo "multinode.sh: $*" >&2
    exit 2
}

hostfile='' node_rank='' master_addr='' master_port=29500 exclude=''
while (($#)); do
    case $1 in
        --hostfile | --node_rank | --master_addr | --master_port | --exclude)
            (($# > 1)) || refuse "$1 needs a value"
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        --*) refuse "there is no option $1; there are --hostfile, --exclude, --node_rank, --master_addr, --master_port" ;;
        *) break ;;
    esac
done
(($#)) || usage

# Print the hosts of the hostfile that take part, one a line; refuse what DeepSpeed would meet with a traceback.
list_hosts() {
    [[ -n $hostfile ]] || refuse "--hostfile is missing; launch/hostfile.example is one"
    [[ -r $hostfile ]] || refuse "there is no readable hostfile '$hostfile'; launch/hostfile.example is one"
    local line=0 name slots rest seen=' ' left=" ${exclude//@/ } "
    while read -r name slots rest || [[ -n $name ]]; do
        line=$((line + 1))
        [[ -n $name && $name != \#* ]] || continue
        [[ $slots =~ ^slots=[1-9][0-9]*$ && ($rest == '' || $rest == \#*) ]] ||
            refuse "$hostfile line $line is '$name $slots $rest'; a line is 'NAME slots=GPUS'"
        [[ $seen != *" $name "* ]] || refuse "$hostfile line $line names '$name' for the second time"
        seen+="$name "
        if [[ $left == *" $name "* ]]; then
            left=${left/ $name / }
        else
            echo "$name"
        fi
    done <"$hostfile"
    [[ $left =~ ^\ *$ ]] || refuse "--exclude names$left, which $hostfile does not"
}

# A host that is down would be noticed only when the others give up waiting; ask all of them first, at the same time.
check_hosts() {
    local host answers dead=0
    answers=$(mktemp -d)
    for host in "${hosts[@]}"; do
        { ssh -o BatchMode=yes -o ConnectTimeout=10 "$host" "test -x '$venv/bin/python' || echo no-environment" \
            >"$answers/$host" 2>&1 || echo "dead $?" >>"$answers/$host"; } &
    done
    wait
    for host in "${hosts[@]}"; do
        if grep -q '^dead' "$answers/$host"; then
            echo "multinode.sh: host $host does not answer ssh: $(head -n 1 "$answers/$host")" >&2
            echo "    mend it, or run on the others with --exclude $host (the global batch must divide by the ranks left)" >&2
            dead=1
        elif grep -q '^no-environment' "$answers/$host"; then
            echo "multinode.sh: host $host has no $venv/bin/python: share this folder with it, or install there too" >&2
            dead=1
        fi
    done
    rm -r "$answers"
    ((dead == 0)) || exit 2
}

# DeepSpeed carries NCCL_* and PYTHON* to the other nodes, and what this file holds; it takes no comments in it.
write_environment() {
    local variable
    for variable in MALLOC_MMAP_THRESHOLD_ MALLOC_TRIM_THRESHOLD_ TORCH_EXTENSIONS_DIR OMP_NUM_THREADS VITFREEZE_LAUNCH; do
        printf '%s=%s\n' "$variable" "${!variable}"
    done
    if [[ -r $root/launch/deepspeed_env ]]; then
        grep -E '^[A-Za-z_][A-Za-z0-9_]*=' "$root/launch/deepspeed_env" || true
    fi
}

# Run a shell command on every node by ssh.
run_everywhere() { PDSH_RCMD_TYPE=ssh pdsh -w "$(IFS=, && echo "${hosts[*]}")" "$1"; }

# Signal the training processes of this launch on every node, and nobody else's. SIGUSR1 goes to those that handle it
# already: the others would die of it.
signal_everywhere() {
    # shellcheck disable=SC2016
    run_everywhere 'for pid in $(pgrep -u "$(id -u)" -f "[-]m vitfreeze "); do
        grep -qzx "VITFREEZE_LAUNCH='"$VITFREEZE_LAUNCH"'" "/proc/$pid/environ" 2>/dev/null || continue
        handled=$(sed -n "s/^SigCgt:[[:space:]]*/0x/p" "/proc/$pid/status")
        if [ '"$1"' = KILL ] || [ $((handled & 0x200)) -ne 0 ]; then kill -'"$1"' "$pid"; fi
    done; true'
}

hosts_text=$(list_hosts)
mapfile -t hosts <<<"$hosts_text"
[[ -n ${hosts[0]} ]] || refuse "no host is left in $hostfile"
install_environment
common=(--hostfile "$hostfile" --master_port "$master_port" --log_level error --no_local_rank)
if [[ -n $exclude ]]; then
    common+=(--exclude "$exclude")
fi

if [[ -n $node_rank ]]; then
    if ! [[ $node_rank =~ ^[0-9]{1,6}$ ]] || ((10#$node_rank >= ${#hosts[@]})); then
        refuse "--node_rank is '$node_rank'; the nodes of $hostfile count from 0 to $((${#hosts[@]} - 1))"
    fi
    [[ -n $master_addr ]] || refuse "--node_rank needs --master_addr, the address of node 0 that the others reach"
    run_and_forward_signals deepspeed "${common[@]}" --no_ssh --node_rank "$node_rank" --master_addr "$master_addr" \
        --module vitfreeze "$@"
    exit
fi

command -v pdsh >/dev/null || refuse "pdsh is not installed; install it, or start every node with --node_rank"
check_hosts
VITFREEZE_LAUNCH=$$.$(date +%s)
export VITFREEZE_LAUNCH
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / $(count_ranks) > 0 ? $(nproc) / $(count_ranks) : 1))}
DS_ENV_FILE=$(mktemp)
export DS_ENV_FILE
write_environment >"$DS_ENV_FILE"
trap 'rm -f "$DS_ENV_FILE"' EXIT
ask_to_stop() { signal_everywhere USR1; }
kill_at_once() { signal_everywhere KILL && kill -KILL -- "-$1"; }
if [[ -n $master_addr ]]; then
    common+=(--master_addr "$master_addr")
fi
run_and_forward_signals deepspeed "${common[@]}" --force_multi --module vitfreeze "$@"
