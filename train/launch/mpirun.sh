#!/usr/bin/env bash
# A DPO run on machines without a scheduler, started by Open MPI over ssh: one process for each GPU.
#
#   HOSTS=node1:8,node2:8 train/launch/mpirun.sh
#
# HOSTS names each machine with its number of processes, the one of process 0 first. Repository, virtual environment
# and output_dir are at the same place on all of them. Open MPI numbers the processes; only version 4 also says where
# the first one runs, so COORDINATOR is given here.
#
# Ctrl-C is no way to stop: mpirun kills the processes two seconds later, which is seldom enough to save, and what was
# done since the last checkpoint is lost. A signal to one of them, on any of the machines, saves and stops all:
#
#   pkill -TERM -o -f '^\.venv/bin/python -m train dpo'
#
# The same command goes on from there. (Open MPI's odls_base_sigkill_timeout does not help: it is waited for in full,
# once before SIGTERM and once before SIGKILL.)
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
