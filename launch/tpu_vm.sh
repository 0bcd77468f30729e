#!/bin/bash
# Training on all workers of a TPU-VM, each of which has this repository in ~/ahawam-jax and the shared disk mounted:
#   launch/tpu_vm.sh NAME ZONE configs/robocoin.py /shared/runs/robocoin [--config.FIELD=VALUE ...]
# The command stays behind on the workers, where ~/ahawam.log grows, and starts again after exit status 75.
set -euo pipefail
if [ $# -lt 4 ]; then
  echo "usage: launch/tpu_vm.sh NAME ZONE CONFIG WORKDIR [--config.FIELD=VALUE ...]" >&2
  exit 2
fi
name=$1 zone=$2
train=$(printf '%q ' .venv/bin/ahawam train --config="$3" --workdir="$4" "${@:5}")
loop="cd ~/ahawam-jax; status=75; while [ \$status -eq 75 ]; do $train; status=\$?; done"
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="nohup bash -c $(printf '%q' "$loop") >> ~/ahawam.log 2>&1 < /dev/null &"
