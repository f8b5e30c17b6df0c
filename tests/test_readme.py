"""What the README shows works as it stands."""

import re
from pathlib import Path

import jax.numpy as jnp

import omerge_jax as om
from train.cli import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_optax_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    tree = {"w": jnp.ones((3, 2))}
    names = {"sft_params": tree, "base_params": {"w": jnp.zeros((3, 2))}, "params": tree}
    names |= {"grads": tree, "schedule": 1e-3}
    exec(code, names)
    assert names["updates"]["w"].shape == (3, 2)
    assert float(names["metrics"]["alpha_total"]) > 0


def test_every_name_in_the_table_exists():
    section = README.split("| name | what |")[1].split("\n\n")[0]
    names = re.findall(r"^\| `(\w+)\(|, `(\w+)`|^\| `(\w+)`", section, re.MULTILINE)
    found = {name for group in names for name in group if name}
    assert {"on_dare", "task_vector", "with_delta"} <= found
    assert found - {"magnitude", "identity", "sign"} <= set(om.__all__)


def test_every_command_and_configuration_exists():
    commands = set(re.findall(r"python -m train ([\w-]+)", README))
    assert {"sft", "dpo", "eval"} <= commands <= set(COMMANDS)
    for path in re.findall(r"train/configs/[\w./-]+\.yaml", README):
        assert (ROOT / path).is_file(), path
