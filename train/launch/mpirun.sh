#!/usr/bin/env bash
# A DPO run on machines without a scheduler, started by Open MPI over ssh: one process for each GPU.
#
#   HOSTS=node1:8,node2:8 train/launch/mpirun.sh
#
# HOSTS names each machine with its number of processes, the one of process 0 first. Repository, virtual environment
# and output_dir are at the same place on all of them. Open MPI numbers the processes; only version 4 also says where
# the first one runs, so COORDINATOR is given here. Ctrl-C once saves and stops; the same command goes on.
set -euo pipefail

hosts=${HOSTS:?such as node1:8,node2:8}
first=${hosts%%,*}
processes=0
for host in ${hosts//,/ }; do
    processes=$((processes + ${host##*:}))
done

mpirun -np "$processes" --host "$hosts" --map-by slot --bind-to none \
    -x JAX_COORDINATOR_ADDRESS="${COORDINATOR:-${first%%:*}:12355}" \
    .venv/bin/python -m train dpo \
    --config train/configs/paper_llama-3-8b.yaml --config train/configs/paper_on_ties.yaml \
    --model.path models/sft --model.base models/base \
    --data.path data/preferences.jsonl --output_dir runs/on-ties
