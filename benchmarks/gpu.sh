#!/bin/sh
# benchmarks/gpu.sh [--tiny] [options of gpu.py]
# Full-size models on the GPU of this machine, in one table (benchmarks/gpu.py). Needs torch 2.11 or newer with CUDA,
# transformers 5.17 or newer and timm. Where no network is, the other packages come as wheels, made elsewhere for this
# version of Python:
#     pip wheel --no-deps -r requirements-gpu.txt -w benchmarks/wheels
# They are unpacked into a temporary folder that goes when this ends; nothing is installed.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
if "$python" -c "import hydra, pydantic, rich" 2>/dev/null; then
    exec "$python" "$here/gpu.py" "$@"
else
    packages=$(mktemp -d)
    trap 'rm -rf "$packages"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --find-links "$here/wheels" --target "$packages" \
        -r "$here/../requirements-gpu.txt"
    export PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}"
    "$python" "$here/gpu.py" "$@"
fi
