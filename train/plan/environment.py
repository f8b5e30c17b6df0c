"""What has to be set before JAX is imported, so that a plan needs no device."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from train.config import UserError


def prepare_environment(topology: str) -> None:
    """Sets the environment for compiling ahead of time.

    Raises `UserError` where JAX already runs with fewer virtual devices than ``cpu:N`` names.
    """
    # Lets the TPU compiler work on a machine without a TPU, beside other programs that load it;
    # where there is a TPU they would hide it.
    if not any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0")):
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    virtual = re.fullmatch(r"cpu:(\d+)", topology)
    if "jax" in sys.modules:
        import jax

        wanted, found = int(virtual[1]) if virtual else 1, len(jax.devices("cpu"))
        if found < wanted:
            raise UserError(
                f"topology names {wanted} CPU devices, but JAX already runs with {found}; use the "
                "command line, or set XLA_FLAGS=--xla_force_host_platform_device_count="
                f"{wanted} before JAX starts."
            )
        return
    # Nothing is computed on devices: a plan must not take those that a run may hold.
    os.environ["JAX_PLATFORMS"] = "cpu"
    if virtual:
        flag = f"--xla_force_host_platform_device_count={virtual[1]}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
