# Sourced by the other scripts: makes a virtual environment, installs the checkout into it once, and
# runs pytest in it. Everything is given by full path, so the current directory doesn't matter.
# shellcheck shell=bash

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { echo "[$(basename "$0")] $*" >&2; }

stop() {
    say "$*"
    exit 1
}

minor_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

# make_environment VENV [PYTHON]: a working virtual environment, kept if there is one already.
make_environment() {
    local venv=$1 python=${2:-}
    if "$venv/bin/python" -c 'import pip' 2>/dev/null; then
        local asked=$python
        if [[ -z $asked && -n ${PYTHON:-} ]]; then
            asked=$("$checkout/scripts/find_python.sh") || exit 1
        fi
        if [[ -n $asked && $(minor_of "$asked") != $(minor_of "$venv/bin/python") ]]; then
            stop "$venv holds Python $(minor_of "$venv/bin/python") and $asked is $(minor_of "$asked");" \
                "remove the folder to change it: rm -r '$venv'"
        fi
        return
    fi
    if [[ -d $venv && ! -f $venv/pyvenv.cfg && -n $(ls -A "$venv") ]]; then
        stop "$venv exists and is no virtual environment; move it out of the way"
    fi
    if [[ -z $python ]]; then python=$("$checkout/scripts/find_python.sh") || exit 1; fi
    say "using $python ($("$python" --version)); making $venv"
    "$python" -m venv --clear "$venv"
}

# The lowest versions that pyproject.toml allows, as pip constraints.
lowest_versions() {
    "$1" - "$checkout/pyproject.toml" <<'PYTHON'
import re, sys, tomllib

with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
wanted = project["dependencies"] + project["optional-dependencies"]["test"]
for requirement in wanted:  # grows by the extras that it names
    if extras := re.match(r"lepton_jax\[(.*)\]", requirement):
        for extra in extras[1].split(","):
            wanted += project["optional-dependencies"][extra]
    elif bound := re.match(r"([\w.-]+)\s*>=\s*([\w.]+)", requirement):
        print(f"{bound[1]}=={bound[2]}")
PYTHON
}

# install_package VENV EXTRA [lowest|newest]: the checkout, editable; EXTRA may be "". Skipped when a
# stamp says that nothing changed since, but not with newest: the index may have changed.
install_package() {
    local venv=$1 extra=$2 versions=${3:-}
    local python=$venv/bin/python stamp=$venv/.installed-${extra:-package} options=()
    local key
    key="$checkout $versions $(cksum <"$checkout/pyproject.toml")"
    if [[ $versions != newest && -f $stamp && $(<"$stamp") == "$key" ]]; then return; fi
    say "installing lepton_jax${extra:+ with the extra $extra} into $venv"
    if [[ $versions == lowest ]]; then
        lowest_versions "$python" >"$venv/lowest.txt"
        # The pip of an old Python searches for minutes where a new one takes seconds.
        "$python" -m pip install --quiet --disable-pip-version-check --upgrade pip
        options=(--constraint "$venv/lowest.txt")
    elif [[ $versions == newest ]]; then
        options=(--upgrade --upgrade-strategy eager)
    fi
    # The bash of macOS takes an empty array for an unset one.
    "$python" -m pip install --quiet --disable-pip-version-check ${options[@]+"${options[@]}"} \
        --editable "$checkout${extra:+[$extra]}" ||
        stop "pip could not install the package: is a package index reachable? (pip config list)"
    echo "$key" | tee "$venv/.installed-package" >"$stamp"
}

# run_pytest VENV [ARGUMENT...]: the fast tests, then the slow ones, in two processes that take turns at
# the files. A process that crashes ends the run: by files, xdist waits forever for its successor.
# Arguments that select tests may leave one of the two without any, but not both. The fast ones spend
# their time compiling tiny models, a third less of it without the backend's optimizations.
run_pytest() {
    local python=$1/bin/python marks status ran=no flags
    shift
    for marks in "not slow" slow; do
        status=0 flags=${XLA_FLAGS:-}
        if [[ $marks != slow ]]; then flags="--xla_backend_optimization_level=0 $flags"; fi
        (cd "$checkout" && JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} XLA_FLAGS=$flags \
            "$python" -m pytest -n 2 --dist loadfile --max-worker-restart=0 --durations=20 \
            -m "$marks" "$@") ||
            status=$?
        case $status in
            0) ran=yes ;;
            5) ;;
            *) return "$status" ;;
        esac
        if [[ ${fast_only:-no} == yes ]]; then break; fi
    done
    [[ $ran == yes ]] || stop "no test was selected by: $*"
}
