# Sourced by the other scripts: makes .venv once, keeps it up to date, and sets what every run needs.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VITFREEZE_VENV:-$root/.venv}
export PATH="$venv/bin:$PATH"

# glibc gives freed image buffers back to the kernel after each picture and asks for them again for the next;
# higher thresholds keep them, which is worth about a third of the decoding time.
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-536870912}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-536870912}
# DeepSpeed compiles its CPU communication kernel on first use; keep it with the environment that it was built for.
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$venv/torch_extensions}

say() { printf '\n==> %s\n' "$*"; }

# Which torch, and where it comes from, is the user's to say: V100s need its CUDA 12.6 build, which the default index
# does not have, and a driver or a cluster may ask for another version than the pinned one.
install_environment() {
    local stamp wanted lock
    stamp=$venv/installed
    wanted=$(
        { cat "$root/pyproject.toml" "$root/constraints.txt" &&
            echo "${TORCH_INDEX_URL:-}${TORCH_VERSION:+ torch $TORCH_VERSION}"; } | sha256sum
    )
    if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
        return
    fi
    mkdir -p "$(dirname "$venv")"
    exec {lock}>"$venv.lock" # nodes that share this folder start together; one installs, the others wait
    flock "$lock"
    if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
        exec {lock}>&-
        return
    fi
    local python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "vitfreeze needs Python 3.10 or newer; '$python' is not. Set PYTHON to one that is." >&2
        exit 2
    fi
    if ! command -v g++ >/dev/null; then
        echo "vitfreeze needs g++: DeepSpeed compiles its CPU communication kernel. Install it and call this again." >&2
        exit 2
    fi
    if [[ ! -x $venv/bin/python ]]; then
        say "Making the virtual environment $venv"
        "$python" -m venv "$venv"
    fi
    say "Installing vitfreeze with the versions of constraints.txt${TORCH_VERSION:+ and torch $TORCH_VERSION}" \
        "(several GB the first time, some minutes)"
    install_packages
    say "Compiling DeepSpeed's communication kernel for CPUs (about a minute)"
    DS_ACCELERATOR=cpu "$venv/bin/python" -W ignore -c \
        'from deepspeed.comm.torch import build_shm_op; build_shm_op()' >/dev/null 2>"$venv/kernel.log" ||
        { cat "$venv/kernel.log" >&2; exit 1; }
    printf '%s\n' "$wanted" >"$stamp"
    exec {lock}>&-
}

# Install the packages; torch's version decides torchvision's, and torch 2.11 to 2.13 ask for an older setuptools.
install_packages() {
    local constraints=$root/constraints.txt pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)
    if [[ -n ${TORCH_VERSION:-} ]]; then
        constraints=$venv/constraints.txt
        grep -vE '^(torch|torchvision|setuptools)==' "$root/constraints.txt" >"$constraints"
        echo "torch==$TORCH_VERSION" >>"$constraints"
    fi
    if [[ -n ${TORCH_INDEX_URL:-} ]]; then
        # pip prefers 2.14.1+cu126 of that index to the plain 2.14.1, but not when this is installed already
        "${pip[@]}" uninstall --yes torch torchvision
        "${pip[@]}" install --extra-index-url "$TORCH_INDEX_URL" --constraint "$constraints" torch torchvision
    fi
    "${pip[@]}" install --constraint "$constraints" --editable "${root}[test]" || {
        echo "The packages cannot be installed${TORCH_VERSION:+ with TORCH_VERSION=$TORCH_VERSION}: see what pip says" \
            "above; pyproject.toml has the range of torch that vitfreeze takes." >&2
        exit 2
    }
}

# Number of processes to start on this machine: one for each GPU that may be used, or two on a machine without.
count_ranks() {
    local gpus=0
    if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
        gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)
    elif command -v nvidia-smi >/dev/null; then
        gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
    fi
    echo $((gpus > 0 ? gpus : 2))
}

# A process that is killed while DeepSpeed loads its kernel leaves a lock behind, at which every later run would wait
# without end. A younger one may be that of a node that shares this folder and starts at this moment.
remove_stale_locks() {
    local old='30 seconds ago'
    if pgrep -u "$(id -u)" -f '[-]m vitfreeze ' >/dev/null; then
        old='10 minutes ago'
    fi
    find "$TORCH_EXTENSIONS_DIR" -name lock ! -newermt "$old" -delete 2>/dev/null || true
}

# Signal the process group of a launcher, and those that its children lead: torchrun gives every rank its own.
signal_groups() {
    local leader
    for leader in "$2" $(pgrep --parent "$2"); do
        kill "-$1" -- "-$leader" 2>/dev/null || true # a child without a group of its own, or one that has ended
    done
}

# What the first and the second Ctrl-C do to a run; a launcher over ssh has its own.
ask_to_stop() { signal_groups USR1 "$1"; }
kill_at_once() { signal_groups KILL "$1"; }

# Run a command in a process group of its own and pass Ctrl-C on as SIGUSR1, which the training processes take as
# "finish the step, save, stop". DeepSpeed's launcher would kill them after 30 seconds; here it does not hear of it.
# Exit status 75 then says: stopped on request with everything saved; the same command goes on.
run_and_forward_signals() {
    local status=0 child interrupted=yes
    if [[ -z ${CUDA_VISIBLE_DEVICES:-} ]] && ! nvidia-smi --list-gpus >/dev/null 2>&1; then
        export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} # or DeepSpeed warns in every process that it found no GPU
    fi
    trap '' USR1 # inherited by the launcher, which would die of it; the training processes install their own handler
    if [[ ${OMP_NUM_THREADS:-} == "" ]]; then
        export OMP_NUM_THREADS=$(($(nproc) / $(count_ranks) > 0 ? $(nproc) / $(count_ranks) : 1))
    fi
    remove_stale_locks
    setsid "$@" &
    child=$!
    trap 'interrupted=yes; trap "interrupted=yes; kill_at_once $child" INT TERM; ask_to_stop "$child"' INT TERM
    while [[ -n $interrupted ]]; do # a trap ends wait with a status of its own, even if the child has ended meanwhile
        interrupted=''
        wait "$child" && status=0 || status=$?
    done
    trap - INT TERM
    return "$status"
}

# Run a vitfreeze command in one process for each GPU of this machine.
run_on_this_machine() {
    local number=(--num_accelerators "$(count_ranks)")
    if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
        number=() # DeepSpeed reads the variable itself, and would ignore it beside a number
    fi
    run_and_forward_signals deepspeed "${number[@]}" --master_port "$(find_free_port)" --log_level error \
        --no_local_rank --module vitfreeze "$@"
}

find_free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}
