#!/usr/bin/env bash
# Run a vitfreeze command by torchrun instead of DeepSpeed's launcher. With a range of nodes it goes on by itself when
# a node is lost: the rest restarts from the newest checkpoint, as long as the global batch divides by the ranks left.
# Usage, on every node (on one alone, no options):
#   bash launch/torchrun.sh [--nnodes N|MIN:MAX --rdzv_endpoint HOST:PORT] [--max_restarts N] [--nproc_per_node N] COMMAND ...
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

options=() nproc_per_node=''
while (($#)); do
    case $1 in
        --nproc_per_node)
            nproc_per_node=${2:?"torchrun.sh: --nproc_per_node needs a value"}
            shift 2
            ;;
        --nnodes | --rdzv_endpoint | --max_restarts | --rdzv_id)
            options+=("${1//_/-}" "${2:?"torchrun.sh: $1 needs a value"}")
            shift 2
            ;;
        --*)
            echo "torchrun.sh: there is no option $1" >&2
            exit 2
            ;;
        *) break ;;
    esac
done
if (($# == 0)); then
    sed -n '2,5s/^# //p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
install_environment
if [[ " ${options[*]} " == *" --rdzv-endpoint "* ]]; then
    options+=(--rdzv-backend c10d)
else
    options+=(--standalone)
fi

# torchrun knows success and failure only, so a rank that stopped on request leaves its status in a file.
stopped=$(mktemp)
trap 'rm -f "$stopped"' EXIT
export stopped
status=0
# shellcheck disable=SC2016
start='python -m vitfreeze "$@" || status=$?
    if ((status == 75)); then echo 75 >"$stopped"; exit 0; fi
    exit "$status"'
run_and_forward_signals torchrun "${options[@]}" --nproc-per-node "${nproc_per_node:-$(count_ranks)}" --no-python \
    bash -c "status=0; $start" vitfreeze "$@" || status=$?
if ((status == 0)) && [[ -s $stopped ]]; then
    status=75
fi
exit "$status"
