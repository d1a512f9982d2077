#!/bin/bash
# Qwen3-30B-A3B on 8 nodes of 8 Ascend NPUs, with PyTorch through torch-npu. Not run on hardware.
#
# Run it on every node at the same time, in the same folder on storage that all nodes share, with the number of the node
# and the address of node 0:
#
#   bash examples/jobs/ascend.sh 0 node-0      # on node 0
#   bash examples/jobs/ascend.sh 1 node-0      # on node 1, and so on
#
# It can be repeated after a failure: --resume continues from the last checkpoint.
set -eu
node=${1:?the number of this node, from 0}
first=${2:?the address of node 0}

# Adapt: CANN's environment (before CANN 8.5 in /usr/local/Ascend/ascend-toolkit), and the Python environment.
set +u
source "${CANN_HOME:-/usr/local/Ascend/cann}/set_env.sh"
set -u
# source .venv/bin/activate

# What works on this node; a line that begins with `wrong` says how to mend it.
moeport doctor

# The values of every collective, before an hour is spent on wrong ones.
ranks=(--nodes 8 --ranks-per-node 8 --node-rank "$node" --master-addr "$first")
torchrun --nnodes=8 --nproc-per-node=8 --node-rank="$node" --master-addr="$first" --master-port=29501 \
    -m moeport probe --device npu

# `launch` sets the variables that HCCL needs; `moeport launch` without --run prints them.
exec moeport launch examples/models/qwen3-30b-a3b.yaml "${ranks[@]}" --set backend.device=npu --resume --run
