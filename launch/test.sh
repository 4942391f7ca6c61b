#!/usr/bin/env bash
# Set up everything on a fresh machine and run the checks: ruff, mypy, pytest. Arguments go to pytest.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_environment
cd "$root"

say "Checking style and types"
ruff check .
ruff format --check .
mypy

say "Running the tests (some minutes; -m slow for the long ones)"
exec python -m pytest -n auto --dist loadfile "$@" # as many processes as cores, at most 4; -n 0 is one
