#!/usr/bin/env bash
# Builds the environments of the implementations that `python -m benchmarks.cpu`, `benchmarks.tpu_schedule` and
# `benchmarks.gpu_schedule` measure beside this library.
# Usage: benchmarks/peers/setup.sh [PYTHON], run from the repository's root; PYTHON (3.12 or newer) defaults to
# .venv/bin/python. About 4 GB on disk. An environment that is complete is left as it is; one that cannot be built
# gets a file left_out.txt with the reason, which the benchmark reports.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:-.venv/bin/python}
failed=0

build() { # build FOLDER PYTHON PIP-ARGUMENTS... : a virtual environment with those packages, unless it is complete
    local folder=$1 interpreter=$2
    shift 2
    if [ "$(cat "$folder/complete.txt" 2>/dev/null)" = "$*" ]; then return; fi
    echo "building $folder: $*"
    rm -rf "$folder"
    if "$interpreter" -m venv "$folder" && "$folder/bin/python" -m pip install --quiet "$@"; then
        echo "$*" >"$folder/complete.txt"
    else
        leave_out "$folder" "pip could not install $*"
        failed=1
    fi
}

leave_out() { # leave_out FOLDER REASON
    mkdir -p "$1"
    echo "$2" >"$1/left_out.txt"
    echo "$1 left out: $2"
}

find_python311() { # prints an interpreter of version 3.11 that can make environments
    local candidate
    for candidate in python3.11 "$(PYENV_VERSION=3.11 pyenv which python3.11 2>/dev/null || true)"; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))' \
            2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
}

# MaxText's own dependencies fill gigabytes; the one function that is measured needs JAX alone.
build .venv-peers "$python" jax==0.12.0.1 tokamax==0.0.17 libtpu==0.0.50.1
[ -e .venv-peers/left_out.txt ] || .venv-peers/bin/python -m pip install --quiet --no-deps maxtext==0.2.5 || failed=1
build .venv-peers-jla "$python" jax==0.11.2 jax-linear-attention==0.1.0
# Its kernels are compiled for a GPU that is not there: of fla-core only the files are read, without torch.
build .venv-fla "$python" --no-deps triton==3.9.0 fla-core==0.6.0

torch=(torch==2.13.0 transformers==5.23.0 numpy)
python311=$(find_python311)
if [ -z "$python311" ]; then
    leave_out .venv-peers-torch "no python3.11 with venv is on PATH (the CPU build of torch is for Python 3.11)"
elif "$python311" -m pip install --quiet --dry-run --ignore-installed --report - "${torch[@]}" 2>/dev/null |
    grep '"name": "nvidia-' >/dev/null; then
    leave_out .venv-peers-torch "only the CUDA build of torch 2.13.0 is to be had here, several gigabytes"
else
    build .venv-peers-torch "$python311" "${torch[@]}"
fi
exit $failed
