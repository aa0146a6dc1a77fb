#!/usr/bin/env bash
# Train on several machines without a scheduler: run this on each of them, with the same NODES and FIRST (host of one of them).
#   NODES=4 FIRST=node0:29500 launch/several_nodes.sh experiment=paper_vicuna_13b parallel.shard_size=8 output=/shared/runs
# Output and shards must lie where all machines see them. A machine that comes back joins again, up to RESTARTS times.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# A round of restarts gets a store of its own: in torchrun's shared one it would read the addresses of processes that died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Seconds from SIGTERM to SIGKILL: a step, or a batch of an evaluation, and the checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}"
exec "${TORCHRUN:-torchrun}" --nnodes="${NODES:?number of machines}" --nproc_per_node="${PROCESSES:-gpu}" \
  --rdzv_backend=c10d --rdzv_endpoint="${FIRST:?host:port of one of them}" --rdzv_id="${RUN:-instructblip}" \
  --max-restarts="${RESTARTS:-3}" train.py resume=auto "$@"
