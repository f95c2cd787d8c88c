#!/usr/bin/env bash
# Lint and tests, as CI runs them.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: scripts/test.sh [--fast] [pytest arguments]

Makes .venv if there is none, installs the package with its test extra, then runs ruff check, ruff
format --check, the fast tests, and the slow tests (real models, TPU compiles; --fast leaves them
out). Other arguments go to pytest: scripts/test.sh tests/test_tensors.py -x
TEXT
}

fast_only=no
case "${1:-}" in
    -h | --help) usage; exit 0 ;;
    --fast) fast_only=yes; shift ;;
esac
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

venv=$checkout/.venv
make_environment "$venv"
install_package "$venv" test
say "Python $(minor_of "$venv/bin/python"), jax $("$venv/bin/python" -c 'import jax; print(jax.__version__)')"
(
    cd "$checkout"
    "$venv/bin/python" -m ruff check .
    "$venv/bin/python" -m ruff format --check .
)
export fast_only
run_pytest "$venv" "$@"
