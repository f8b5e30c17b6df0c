"""Settings of ``python -m train plan``."""

from __future__ import annotations

from dataclasses import dataclass

from train.config.commands import DPOConfig


@dataclass(frozen=True, kw_only=True)
class PlanConfig(DPOConfig):
    """What a step of a `dpo` run needs on a machine that need not be there.

    It takes the settings of `dpo` as they are. Of the model only config.json is read; nothing is
    allocated, and neither data nor weights need exist.

    Attributes:
        topology: What to plan for: a slice of TPUs such as v5p:4x4x8, v5e:4x4 or v6e:8x8, or
            several that a network joins, 2xv5e:4x4 (needs the package libtpu, no TPU); cpu:8, virtual
            devices of this machine; or GPUs by arithmetic alone, h100:8, h200:16, or gpu:8x80 for 8
            with 80 GB each.
        output_file: JSON file for the figures; an older plan is replaced. Unset: none is written.
        search: Try meshes, remat policies, parts of a batch and ways to hold the delta, and show the
            fastest that fit.
        output_dir: Of the run; a plan does not touch it.
    """

    topology: str
    output_file: str | None = None
    search: bool = False
    output_dir: str = ""
