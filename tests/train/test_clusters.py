"""What settings and environment say about the processes of a run; nothing here waits or connects."""

import re

import pytest

from train.config import DistributedOptions, UserError
from train.distributed import clusters
from train.distributed.clusters import find_group

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
OMPI_4 = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
}
OMPI_5 = {name: value for name, value in OMPI_4.items() if "orte" not in name}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
THREE = {
    "JAX_COORDINATOR_ADDRESS": "node1:1234",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "1",
}


def group(environment, **options):
    return find_group(DistributedOptions(**options), environment)


@pytest.fixture
def on_a_tpu(monkeypatch):
    monkeypatch.setattr(clusters, "_may_use_tpu", lambda environment: True)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        OMPI_5 | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        POD,  # a pod of no indexed job, such as a notebook
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},  # sbatch's own shell, without srun
        {"TPU_WORKER_HOSTNAMES": "a,b"},  # without a TPU
        {"JAX_NUM_PROCESSES": "1"},
    ],
)
def test_one_process_joins_nothing(environment):
    assert group(environment) is None


def test_off_joins_nothing_whatever_the_environment_says():
    for environment in (SLURM, OMPI_5, THREE):
        assert group(environment, mode="off") is None


def test_schedulers_are_left_to_jax():
    found = group(SLURM)
    assert (found.address, found.processes, found.process, found.local) == (None, 4, 3, 1)
    assert not found.explicit
    found = group(OMPI_4)
    assert (found.address, found.processes, found.process, found.local) == (None, 2, 1, 1)


def test_slices_of_gke_and_of_cloud_tpu_are_left_to_jax(on_a_tpu):
    found = group({"TPU_WORKER_HOSTNAMES": "a,b,c,d", "MEGASCALE_NUM_SLICES": "2"})
    assert (found.processes, found.process, found.explicit) == (8, None, False)
    assert group({"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert group({}).cluster == "Cloud TPU"
    assert group({"TPU_SKIP_MDS_QUERY": "1"}) is None  # for compilation without one


def test_settings_come_before_variables_and_the_cluster_fills_in():
    found = group(THREE, coordinator_address="node9:1", process_id=0)
    assert (found.address, found.processes, found.process) == ("node9:1", 2, 0)
    assert found.explicit
    assert found.local is None  # all the devices of the machine
    found = group(OMPI_5 | {"JAX_COORDINATOR_ADDRESS": "node1:1234"})
    assert (found.address, found.processes, found.process, found.local) == ("node1:1234", 2, 1, 1)
    assert group(SLURM, coordinator_address="ib-node1:1234").explicit


@pytest.mark.parametrize(
    ("environment", "options", "message"),
    [
        (
            {},
            {"coordinator_address": "node1:1", "num_processes": 2},
            "distributed.coordinator_address is set, and no cluster was found that knows the rest: "
            "give distributed.process_id (or JAX_PROCESS_ID).",
        ),
        (
            {"JAX_PROCESS_ID": "0"},
            {},
            "distributed.process_id is set, and no cluster was found that knows the rest: give "
            "distributed.coordinator_address (or JAX_COORDINATOR_ADDRESS), "
            "distributed.num_processes (or JAX_NUM_PROCESSES).",
        ),
        (OMPI_5, {}, "this version of Open MPI does not say where process 0 runs: give distr"),
        (SLURM, {"num_processes": 2}, "distributed.num_processes is 2, but Slurm says 4."),
        (THREE | {"JAX_PROCESS_ID": "2"}, {}, "distributed.process_id must be in [0, 2), of"),
        (THREE | {"JAX_PROCESS_ID": "one"}, {}, "JAX_PROCESS_ID must be a number, got 'one'."),
        (THREE, {"coordinator_address": "node1"}, "must be HOST:PORT, the host of process 0"),
        (THREE, {"coordinator_address": "node1:99999"}, "got 'node1:99999'."),
        ({}, {"mode": "off", "process_id": 1}, "distributed.process_id is 1, but distributed.mode"),
        (THREE, {"num_processes": 0}, "distributed.num_processes must be positive, got 0."),
    ],
)
def test_what_is_not_enough_or_does_not_agree_is_refused(environment, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        group(environment, **options)


def test_a_kubernetes_job_needs_the_package_or_the_settings(monkeypatch):
    pod = POD | {"JOB_COMPLETION_INDEX": "0"}
    monkeypatch.setattr(clusters.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'jax\[k8s\]'.*distributed.mode off"):
        group(pod)
    assert group(pod | THREE).explicit
    monkeypatch.setattr(clusters.importlib.util, "find_spec", lambda name: object())
    assert not group(pod).explicit
