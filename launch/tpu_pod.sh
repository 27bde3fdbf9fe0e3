#!/usr/bin/env bash
# Runs one cosr command on every host of a Cloud TPU slice.
#
#   launch/tpu_pod.sh [--dry-run] TPU_NAME ZONE -- cosr train --config=... --workdir=...
#
# Every host runs the same command; JAX finds its peers through the TPU metadata (port 8482 has to
# be open between the hosts).  Before the first run, install on all hosts:
#
#   launch/tpu_pod.sh TPU_NAME ZONE -- pip install -e '.[tpu]'
#
# The checkout is expected in COSR_REMOTE_DIR (default: cosr_jax in the home folder) on each host,
# and --workdir has to be storage that all hosts share.  Memory needs can be known beforehand,
# without a TPU: cosr plan --config=... --topology=v5e:4x4
#
# State: the command line is tested with --dry-run; it has not been run on real hardware yet.
set -euo pipefail

usage() {
  echo "usage: launch/tpu_pod.sh [--dry-run] TPU_NAME ZONE -- COMMAND..." >&2
  exit 2
}

dry_run=false
if [[ "${1:-}" == --dry-run ]]; then
  dry_run=true
  shift
fi
if (($# < 4)) || [[ "$3" != -- ]]; then
  usage
fi
name=$1
zone=$2
shift 3

# %q quotes each word for the shell on the other side.
printf -v words '%q ' "$@"
cache=${JAX_COMPILATION_CACHE_DIR:-}
printf -v remote 'cd %q && %sexec %s' "${COSR_REMOTE_DIR:-cosr_jax}" \
  "${cache:+export JAX_COMPILATION_CACHE_DIR=$(printf %q "$cache") && }" "${words% }"

launch=(gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" --worker=all "--command=$remote")
if $dry_run; then
  printf '%q ' "${launch[@]}"
  echo
else
  exec "${launch[@]}"
fi
