#!/bin/sh
# Install the wheel in a folder beside the vLLM of this image, and nothing else: install-wheel.sh FOLDER
# Without an index pip can only use what is here: it fails rather than bring another torch.
set -eu
python3 -m pip install --no-cache-dir --no-index "$1"/xquant_vllm-*.whl
# The library has CUDA's runtime inside and loads without a GPU.
python3 -c 'from xquant_vllm.attention.gpu.cuda import library; library.load()'
