"""Prompts, rewards and models for tests of whole runs on sampled answers."""

from __future__ import annotations

from pathlib import Path

from tests.train.builders import save_reward_model
from tests.train.tiny_runs import write_inputs, write_jsonl


def write_reward_inputs(directory: Path, rewards: str) -> dict[str, str]:
    """What `write_inputs` makes, 24 numbered prompts, a reward model, and `tiny_task.py`.

    Args:
        directory: Where.
        rewards: Source of the module `tiny_task`.

    Returns:
        Paths by name; the module's directory is ``"python"``.
    """
    prompts = [{"prompt": [{"role": "user", "content": f"{n}?"}], "n": n} for n in range(24)]
    (directory / "tiny_task.py").write_text(rewards)
    save_reward_model(directory / "reward")
    return {
        **write_inputs(directory),
        "prompts": str(write_jsonl(directory / "prompts.jsonl", prompts)),
        "reward": str(directory / "reward"),
        "python": str(directory),
    }
