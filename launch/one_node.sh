#!/usr/bin/env bash
# Train on all GPUs of this machine; what follows is train.py's:
#   launch/one_node.sh experiment=paper_vicuna_7b data.shards=/data/shards
# Without a GPU, or with fewer of them: PROCESSES=2 launch/one_node.sh device=cpu
# A process that dies ends the others; torchrun starts all of them again, from the newest checkpoint, up to RESTARTS times.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# A round of restarts gets a store of its own: in torchrun's shared one it would read the addresses of processes that died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Seconds from SIGTERM to SIGKILL: a step, or a batch of an evaluation, and the checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}"
exec "${TORCHRUN:-torchrun}" --standalone --nproc_per_node="${PROCESSES:-gpu}" --max-restarts="${RESTARTS:-3}" \
  train.py resume=auto "$@"
