#!/usr/bin/env bash
# Set up everything on a fresh machine and run the main job in small: draw images, pack shards, pre-train with
# freezing on every GPU (or two CPU processes), export, k-NN. Ctrl-C saves; the same command goes on.
# Usage: bash launch/demo.sh [section.key=value ...]
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_environment
cd "$root"

say "Drawing labelled images and packing them as WebDataset shards in shards/demo"
python -m data_prep demo --out shards/demo

say "Pre-training in $(count_ranks) processes; the run folder is runs/demo unless run.dir says otherwise"
run_on_this_machine pretrain demo "$@"
