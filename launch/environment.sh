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

install_environment() {
    local stamp wanted
    stamp=$venv/installed
    wanted=$(cat "$root/pyproject.toml" "$root/constraints.txt" | sha256sum)
    if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
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
    say "Installing vitfreeze with the versions of constraints.txt (several GB the first time, some minutes)"
    "$venv/bin/python" -m pip install --disable-pip-version-check --quiet --constraint "$root/constraints.txt" \
        --editable "$root[test]"
    printf '%s\n' "$wanted" >"$stamp"
}

# Number of processes to start on this machine: one for each GPU, or two on a machine without.
count_ranks() {
    local gpus=0
    if command -v nvidia-smi >/dev/null; then
        gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
    fi
    echo $((gpus > 0 ? gpus : 2))
}

# Run a command in a process group of its own and pass Ctrl-C on as SIGUSR1, which the training processes take as
# "finish the step, save, stop". DeepSpeed's launcher would kill them after 30 seconds; here it does not hear of it.
run_and_forward_signals() {
    local status=0 interrupts=0 child
    trap '' USR1 # inherited by the launcher, which would die of it; the training processes install their own handler
    if [[ ${OMP_NUM_THREADS:-} == "" ]]; then
        export OMP_NUM_THREADS=$(($(nproc) / $(count_ranks) > 0 ? $(nproc) / $(count_ranks) : 1))
    fi
    setsid "$@" &
    child=$!
    # shellcheck disable=SC2064
    trap "interrupts=\$((interrupts + 1))
        if ((interrupts > 1)); then kill -KILL -- -$child; else kill -USR1 -- -$child; fi" INT TERM
    while :; do
        wait "$child" && status=0 || status=$?
        kill -0 "$child" 2>/dev/null || break
    done
    trap - INT TERM
    return "$status"
}

find_free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}
