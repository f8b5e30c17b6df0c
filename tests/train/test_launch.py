"""The launch files parse, and what they run is a command of this repository."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from train.cli import COMMANDS
from train.config import DPOConfig
from train.config.command_line import configured

LAUNCH = Path(__file__).parents[2] / "train" / "launch"
SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))


def command_in(text):
    """The flags after `python -m train dpo`, with line breaks and quotes undone."""
    found = re.search(r"python -m train dpo (.*?--output_dir [\w/-]+)", text, re.DOTALL)
    assert found is not None
    return shlex.split(found[1].replace("\\\n", " "))


def check_command(text, monkeypatch):
    monkeypatch.chdir(LAUNCH.parents[1])
    assert "dpo" in COMMANDS
    config = configured("dpo", DPOConfig, command_in(text))
    assert config.optimizer.name == "on_ties_adamw"
    assert config.model.base is not None
    assert config.distributed.mode == "auto"


def test_there_is_one_for_each_way():
    names = {path.name for path in LAUNCH.iterdir()}
    assert names >= {"jobset_tpu.yaml", "xpk.sh", "slurm_gpu.sbatch", "mpirun.sh"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses_and_its_command_is_understood(script, monkeypatch):
    checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    check_command(script.read_text(), monkeypatch)


def test_the_job_set_has_a_process_for_every_host_of_its_slice(monkeypatch):
    jobs = yaml.safe_load((LAUNCH / "jobset_tpu.yaml").read_text())
    assert jobs["kind"] == "JobSet"
    (job,) = jobs["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = 1
    for size in topology.split("x"):
        chips *= int(size)
    assert spec["completions"] * container["resources"]["limits"]["google.com/tpu"] == chips
    assert spec["parallelism"] == spec["completions"]
    assert spec["completionMode"] == "Indexed"
    check_command(container["args"][0], monkeypatch)
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]


def test_mpirun_counts_the_processes_and_names_the_first_host(tmp_path):
    stand_in = tmp_path / "mpirun"
    stand_in.write_text('#!/bin/sh\necho "$@"\n')
    stand_in.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOSTS": "node1:8,node2:4"}
    script = LAUNCH / "mpirun.sh"
    shown = subprocess.run([script], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("-np 12 --host node1:8,node2:4 ")
    assert "-x JAX_COORDINATOR_ADDRESS=node1:12355 " in shown.stdout
    # The signal to one process, as the script describes it, finds the processes and not mpirun.
    found = re.search(r"pkill -TERM -o -f '(.*)'", script.read_text())
    assert found is not None
    assert re.search(found[1], shown.stdout[shown.stdout.index(".venv/bin/python") :])
    assert not re.search(found[1], f"mpirun {shown.stdout}")
