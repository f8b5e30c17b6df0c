"""Programs on a number of virtual devices, which a process can only be given before it starts."""

from __future__ import annotations

import os
import subprocess
import sys


def run_python(
    *arguments: str, devices: int, timeout: float | None = None, **environment: str
) -> str:
    """Runs Python with arguments and waits for it; returns what it prints.

    Args:
        arguments: Such as ``"-c", program``.
        devices: CPU devices that it sees.
        timeout: In seconds; None for none.
        environment: Further variables.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
