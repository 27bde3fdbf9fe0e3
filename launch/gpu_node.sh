#!/usr/bin/env bash
# Runs one cosr command on the GPUs of a node, or of a SLURM allocation.
#
#   launch/gpu_node.sh [--dry-run] cosr train --config=... --workdir=...
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 --wrap \
#     'launch/gpu_node.sh cosr train --config=... --workdir=...'
#
# Outside SLURM one process drives all GPUs of the machine.  Inside an allocation srun starts one
# process for each GPU, and JAX finds its peers through SLURM's variables; --workdir then has to be
# storage that all nodes share.  Ask for whole nodes and not with --gpus-per-task: JAX lets the i-th
# process of a node take the i-th of all its GPUs, so each has to see them all (jax issue 28194).
#
# State: the command line is tested with --dry-run; it has not been run on real hardware yet.
set -euo pipefail

dry_run=false
if [[ "${1:-}" == --dry-run ]]; then
  dry_run=true
  shift
fi
if (($# == 0)); then
  echo "usage: launch/gpu_node.sh [--dry-run] COMMAND..." >&2
  exit 2
fi

# O1 bundles XLA's latency hiding and collective pipelining.
export JAX_OPTIMIZATION_LEVEL=${JAX_OPTIMIZATION_LEVEL:-O1}
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/cosr_jax/xla}

launch=("$@")
if [[ -n "${SLURM_JOB_ID:-}" ]]; then
  if [[ -z "${SLURM_GPUS_ON_NODE:-}" ]]; then
    echo "launch/gpu_node.sh: SLURM gave no GPUs; ask for them, e.g. --gpus-per-node=8" >&2
    exit 2
  fi
  # One dead process ends the step: the others would wait for it in a collective for ever.
  launch=(srun "--ntasks-per-node=$SLURM_GPUS_ON_NODE" --kill-on-bad-exit=1 "$@")
fi

if $dry_run; then
  printf '%q ' "JAX_OPTIMIZATION_LEVEL=$JAX_OPTIMIZATION_LEVEL" \
    "XLA_PYTHON_CLIENT_MEM_FRACTION=$XLA_PYTHON_CLIENT_MEM_FRACTION" \
    "JAX_COMPILATION_CACHE_DIR=$JAX_COMPILATION_CACHE_DIR" "${launch[@]}"
  echo
else
  exec "${launch[@]}"
fi
