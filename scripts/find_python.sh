#!/usr/bin/env bash
# Which Python to build on: the newest of 3.11 to 3.14 that can make a virtual environment. A newer
# Python gets a newer jax, and that is faster on CPU.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: scripts/find_python.sh [--all]

Prints the path of the newest usable Python: CPython 3.11 or newer with the venv module. Looks at
$PYTHON (if set, it alone is tried), python3.14 to python3.11 on PATH and in pyenv's versions folder
($PYENV_ROOT, ~/.pyenv), and last at python3.

  --all   print every minor version found instead, newest first, one "version path" a line
TEXT
}

# Prints "ok VERSION PATH" or the reason why this one can't be used.
probe() {
    "$1" - 2>/dev/null <<'PROBE' || echo "does not run as Python 3"
import sys, sysconfig

version = ".".join(map(str, sys.version_info[:3]))
if sys.version_info < (3, 11):
    print(f"is Python {version}; 3.11 or newer is needed")
elif sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
    print("is not the usual CPython build; jax has no packages for it")
else:
    try:
        import ensurepip, venv
    except ImportError:
        minor = f"3.{sys.version_info[1]}"
        print(f"has no venv module (on Debian and Ubuntu: apt-get install python{minor}-venv)")
    else:
        print("ok", version, sys.executable)
PROBE
}

# Every place where Python 3.$1 may lie; pyenv's newest patch release first.
places() {
    type -aP "python3.$1" || true
    local root
    for root in "${PYENV_ROOT:-}" "$HOME/.pyenv"; do
        [[ -n $root && -d $root/versions ]] || continue
        find "$root/versions" -maxdepth 1 -name "3.$1.*" | sort -rV | sed "s|\$|/bin/python3.$1|"
    done
}

found=()
skipped=()
consider() {
    local answer
    answer=$(probe "$1")
    if [[ $answer == "ok "* ]]; then
        found+=("${answer#ok }")
    else
        skipped+=("$1 $answer")
        return 1
    fi
}

refuse() {
    echo "find_python.sh: $1" >&2
    if ((${#skipped[@]})); then printf '  %s\n' "${skipped[@]}" >&2; fi
    echo "Install Python 3.11 or newer with its venv module, or name one: PYTHON=/path/to/python3" >&2
    exit 1
}

all=no
case "${1:-}" in
    "") ;;
    --all) all=yes ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
esac

if [[ -n ${PYTHON:-} ]]; then
    consider "$PYTHON" || refuse "PYTHON=$PYTHON can't be used:"
else
    for minor in 14 13 12 11; do
        while read -r place; do
            if consider "$place"; then break; fi
        done < <(places "$minor")
        if ((${#found[@]})) && [[ $all == no ]]; then break; fi
    done
    if ! ((${#found[@]})); then
        while read -r place; do
            if consider "$place"; then break; fi
        done < <(type -aP python3 python || true)
    fi
fi
((${#found[@]})) || refuse "no usable Python was found${skipped[0]:+; what was tried:}"
if [[ $all == yes ]]; then
    printf '%s\n' "${found[@]}"
else
    echo "${found[0]#* }"
fi
