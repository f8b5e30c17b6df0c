#!/usr/bin/env bash
# A DPO run on TPU slices of GKE by way of xpk (https://github.com/AI-Hypercomputer/xpk), which makes the JobSet itself.
#
#   CLUSTER=my-cluster PROJECT=my-project ZONE=us-east5-a IMAGE=... train/launch/xpk.sh
#
# v5p-32 is a slice of 16 chips (v5p counts two cores a chip). The image holds this repository in /app. STORAGE is a
# file system attached before by `xpk storage attach`, mounted at /shared and writable by all pods. xpk restarts on
# 127 to 255, so on kills; 75 (told to stop, or another process has gone) is added.
set -euo pipefail

xpk workload create \
    --workload "${WORKLOAD:-on-ties}" \
    --cluster "${CLUSTER:?name of the xpk cluster}" \
    --project "${PROJECT:?Google Cloud project}" \
    --zone "${ZONE:?zone of the cluster}" \
    --docker-image "${IMAGE:?image with this repository in /app}" \
    --tpu-type "${TPU_TYPE:-v5p-32}" \
    --num-slices "${SLICES:-1}" \
    --storage "${STORAGE:-shared}" \
    --max-restarts 100 \
    --restart-on-exit-codes 75 \
    --termination-grace-period-seconds 180 \
    --command "cd /app && exec python -m train dpo \
        --config train/configs/paper_llama-3-8b.yaml --config train/configs/paper_on_ties.yaml \
        --model.path /shared/models/sft --model.base /shared/models/base \
        --data.path /shared/data/preferences.jsonl --output_dir /shared/runs/on-ties"
