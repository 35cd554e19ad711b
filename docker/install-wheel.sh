#!/bin/sh
# Install the wheel in a folder beside the vLLM of this image, and nothing else: install-wheel.sh FOLDER
# Without an index pip can only use what is here: it fails rather than bring another torch.
set -eu
python3 -m pip install --no-cache-dir --no-index "$1"/xquant_vllm-*.whl
# The kernels can be imported beside this vLLM's torch and Triton, without a GPU.
python3 -c 'import xquant_vllm.attention.gpu.kernels'
