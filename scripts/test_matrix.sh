#!/usr/bin/env bash
# The tests on the oldest supported versions and on the newest, each in an environment of its own.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: scripts/test_matrix.sh [--all] [--fast] [pytest arguments]

Runs the tests twice, in environments under .venv-matrix/ that are kept for the next time:
  oldest   the oldest Python found (3.11 or newer), every package at the lower bound in pyproject.toml
  newest   the newest Python found, every package as new as the index has it
--all adds the newest packages on the other Pythons found. --fast leaves out the slow tests.
Other arguments go to pytest. All are run even when one fails; the exit status says whether one did.
TEXT
}

all=no
fast_only=no
while [[ ${1:-} == -h || ${1:-} == --help || ${1:-} == --all || ${1:-} == --fast ]]; do
    case $1 in
        --all) all=yes ;;
        --fast) fast_only=yes ;;
        *) usage; exit 0 ;;
    esac
    shift
done
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
export fast_only

found=$("$checkout/scripts/find_python.sh" --all) || exit 1
IFS=$'\n' read -r -d '' -a pythons <<<"$found" || true  # the bash of macOS has no mapfile
last=$((${#pythons[@]} - 1))
if ((last == 0)); then say "only one Python was found (${pythons[0]}): both runs use it"; fi
runs=("lowest ${pythons[last]}" "newest ${pythons[0]}")
if [[ $all == yes ]]; then
    for ((i = 1; i <= last; i++)); do runs+=("newest ${pythons[i]}"); done
fi

failed=()
for run in "${runs[@]}"; do
    read -r versions version python <<<"$run"
    venv=$checkout/.venv-matrix/$versions-python${version%.*}
    # In a subshell of its own, without "set -e" being undone by the "if".
    set +e
    (
        set -e
        make_environment "$venv" "$python"
        install_package "$venv" test "$versions"
        say "$versions: Python $version, jax $("$venv/bin/python" -c 'import jax; print(jax.__version__)')"
        run_pytest "$venv" "$@"
    )
    status=$?
    set -e
    if ((status)); then failed+=("$versions-python${version%.*}"); fi
done
if ((${#failed[@]})); then stop "failed: ${failed[*]}"; fi
say "passed: ${#runs[@]} environments"
