#!/bin/bash
#SBATCH --job-name=moeport
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
# All cores of the nodes; with --cpus-per-rank N, N for each rank:
#SBATCH --exclusive
# Adapt this: options that your site requires, such as #SBATCH --account=NAME or memory.

# Adapt this: activate the Python environment that has moeport, for example with
# source .venv/bin/activate

set -u
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((15000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT

# Each Slurm task is the launcher of a node, so its cores are divided among the 8 ranks of the node.
cores=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 8 ? cores / 8 : 1))}

arguments=(--nnodes=8 --nproc-per-node=8 -m moeport train examples/models/qwen3-30b-a3b.yaml)
[ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] || arguments+=(--resume)

# Slurm sends USR1 300 s before the time limit: the run saves and ends, and the job is queued again.
asked= signalled=
trap 'asked=yes signalled=yes; kill -USR1 "$step" 2>/dev/null' USR1
srun --kill-on-bad-exit=1 --cpus-per-task="$cores" \
    bash -c 'exec python -m moeport.launch.node torchrun --node-rank=$SLURM_NODEID --master-addr=$MASTER_ADDR --master-port=$MASTER_PORT "$@"' bash "${arguments[@]}" &
step=$!
wait "$step"
code=$?
while [ -n "$signalled" ]; do  # a signal ends `wait`, not the step
    signalled=
    wait "$step" 2>/dev/null
    again=$?
    [ "$again" -eq 127 ] || code=$again  # 127: the step had ended before the signal
done
if [ -n "$asked" ] && [ "$code" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
