#!/usr/bin/env bash
# Makes a virtual environment and installs rlhf_flows into it, editable.
#
#   scripts/install.sh           what a run needs
#   scripts/install.sh --dev     and what tests and lint need
#   scripts/install.sh --browser and what the tests in a browser need
#
# PYTHON chooses the interpreter, VENV the folder (.venv). A stamp in the folder makes a second
# call free until pyproject.toml, a lock or this script changes.
#
# Linux x86_64 gets the lock, without dependency resolution: it holds the one set of versions in
# which vLLM for CPU, torch, Ray and Prefect live together. That set needs the "+cpu" build of
# torch. Where pip finds none, rlhf_flows is installed with ordinary dependencies and no vLLM;
# rollouts then use the generator of transformers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV:-.venv}
lock=locks/linux-x86_64-cpu.txt
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

say() { printf '%s\n' "install: $*" >&2; }
die() { say "$@"; exit 1; }
pip() { "$venv/bin/python" -m pip "$@"; }
fingerprint() { cat pyproject.toml locks/*.txt scripts/install.sh | cksum; }

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

find_python() {
    if [[ -n ${PYTHON:-} ]]; then
        fits "$PYTHON" || die "PYTHON=$PYTHON is not a working Python 3.11 or 3.12"
        echo "$PYTHON"
        return
    fi
    local candidate
    for candidate in python3.11 python3.12 python3 python; do
        if fits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "no Python 3.11 or 3.12 found: install one, or name it, e.g. make train PYTHON=/path/to/python3.11"
}

make_venv() {
    if [[ -d $venv ]]; then
        fits "$venv/bin/python" || die "$venv holds no working Python 3.11 or 3.12: remove it and call again"
        return
    fi
    local python
    python=$(find_python)
    say "making $venv with $("$python" --version)"
    "$python" -m venv "$venv" || {
        rm -rf "$venv"
        die "$python cannot make virtual environments: on Debian and Ubuntu install python3-venv"
    }
}

install_runtime() {
    if [[ $(uname -sm) == "Linux x86_64" ]] && pip install --quiet --no-deps torch==2.13.0+cpu; then
        say "installing the versions of $lock (some minutes)"
        pip install --quiet --no-deps -r "$lock"
        pip install --quiet --no-deps --no-build-isolation --editable .
        echo lock >"$venv/.rlhf-flows-kind"
    else
        say "no +cpu build of torch 2.13.0 for this machine: installing ordinary dependencies, without vLLM."
        say "rollouts will use the generator of transformers (slower; nothing else changes)"
        pip install --quiet --editable '.[s3]' --constraint "$lock"
        echo plain >"$venv/.rlhf-flows-kind"
    fi
}

# What comes on top has its own lock, which fits the runtime lock; elsewhere pip resolves the extra.
install_extra() {
    say "installing what $1 needs"
    if [[ $(<"$venv/.rlhf-flows-kind") == lock ]]; then
        pip install --quiet --no-deps -r "locks/$1.txt"
    else
        pip install --quiet --editable ".[$1]" --constraint "$lock" --constraint "locks/$1.txt"
    fi
}

# once NAME COMMAND…: run the command unless it succeeded before with the same locks.
once() {
    local stamp="$venv/.rlhf-flows-$1"
    [[ -f $stamp && $(<"$stamp") == "$(fingerprint)" ]] && return
    "${@:2}"
    fingerprint >"$stamp"
}

make_venv
once runtime install_runtime
for option in "$@"; do
    case $option in
        --dev) once dev install_extra dev ;;
        --browser) once browser install_extra browser ;;
        *) die "unknown option $option: --dev and --browser are known" ;;
    esac
done
