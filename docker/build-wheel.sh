#!/bin/sh
# Build the wheel of the project in this folder: build-wheel.sh FOLDER
# setup.py says which variables decide about its kernels. Neither torch nor vLLM is needed.
set -eu
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python3 -m venv "$environment"
"$environment/bin/pip" install --quiet --no-cache-dir build==1.6.1 setuptools==78.1.1
"$environment/bin/python" -m build --wheel --no-isolation --outdir "$1"
