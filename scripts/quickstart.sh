#!/usr/bin/env bash
# From a fresh checkout to answers: environment, package, demo model, the 32 shipped prompts.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: scripts/quickstart.sh [--config.section.field=value ...]

Makes a virtual environment in .venv (newest Python from 3.11 up; PYTHON=/path/to/python3 overrides),
installs the package, fetches the demo model into the user's cache, and answers the 32 prompts that
ship with the checkout. Arguments go on to the driver, which runs in the checkout's folder:

    .venv/bin/python -m lepton_jax.run --config=configs/quickstart.py [arguments]

Every option of the driver: .venv/bin/python -m lepton_jax.run --helpfull
TEXT
}

case "${1:-}" in -h | --help) usage; exit 0 ;; esac
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

make_environment "$checkout/.venv"
install_package "$checkout/.venv" ""
say "Python $(minor_of "$checkout/.venv/bin/python") in $checkout/.venv"
cd "$checkout"
exec .venv/bin/python -m lepton_jax.run --config=configs/quickstart.py "$@"
