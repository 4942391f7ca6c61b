#!/usr/bin/env bash
# Run a vitfreeze command on every GPU of this machine, or on those that CUDA_VISIBLE_DEVICES names; on a machine
# without, in two CPU processes. Ctrl-C saves and stops (status 75); the same command goes on.
# Usage: bash launch/local.sh COMMAND RECIPE [section.key=value ...]      as in: local.sh pretrain vit_base_1x8_v100
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if (($# == 0)); then
    sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
install_environment
run_on_this_machine "$@"
