#!/bin/bash
# One rank of a Slurm step: says in the words of torch and DeepSpeed what srun says in its own, then runs the command.
# Call:  srun cluster/srun_rank.sh python -m align +recipe=sft_dpo
# Set MASTER_ADDR or MASTER_PORT before srun only where the first node's name or the port made here do not do.
set -eu
: "${SLURM_PROCID:?start this with srun}"

tasks_on_node() { # "2(x3),1" is 2 2 2 1: one number a node
  local entry times
  for entry in ${1//,/ }; do
    times=1
    [[ $entry == *x* ]] && times=${entry#*x} && times=${times%)}
    for ((; times > 0; times--)); do echo "${entry%%(*}"; done
  done
}

export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
LOCAL_WORLD_SIZE=$(tasks_on_node "${SLURM_STEP_TASKS_PER_NODE:-$SLURM_NTASKS}" | sed -n "$((${SLURM_NODEID:-0} + 1))p")
# With --gpus-per-task a task sees one GPU, which is number 0 to it.
if [[ -n ${CUDA_VISIBLE_DEVICES:-} && $CUDA_VISIBLE_DEVICES != *,* ]]; then
  LOCAL_RANK=0 LOCAL_WORLD_SIZE=1
fi
export LOCAL_WORLD_SIZE LOCAL_SIZE=$LOCAL_WORLD_SIZE
if [[ -z ${MASTER_ADDR:-} ]]; then
  hosts=$(scontrol show hostnames "${SLURM_STEP_NODELIST:-$SLURM_JOB_NODELIST}")
  export MASTER_ADDR=${hosts%%$'\n'*}
fi
# Jobs that share a first node must not share a port.
export MASTER_PORT=${MASTER_PORT:-$((20000 + (SLURM_JOB_ID * 8 + SLURM_STEP_ID) % 20000))}
exec "$@"
