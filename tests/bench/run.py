"""The parts of the benchmark, and what each leaves out where something is not installed."""

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable, Sequence
from typing import Any

import jax
from rich.console import Console

from tests.bench import cases, compiled, storage, tables, timing
from tests.bench.budgets import budgets

PARTS = ("cpu", "accelerator", "torch", "torch_gpu", "tpu", "storage")
_STORAGE_RUN_MILLIONS = 2.0


class Benchmark:
    """Runs parts of the benchmark, prints their tables and collects their results.

    Args:
      console: shows the tables.
      millions: parameters in millions that steps are timed with.
      rounds: pairs of timed steps.
      topologies: TPU topologies to compile for.
      large_shapes: shapes to compile for them.
    """

    def __init__(
        self,
        console: Console,
        *,
        millions: float,
        rounds: int,
        topologies: Sequence[str],
        large_shapes: Any,
    ):
        self.console = console
        self.rounds = rounds
        self.topologies = topologies
        self.shapes = cases.parameter_shapes(millions)
        self.large_shapes = large_shapes
        self.results: dict[str, Any] = {"environment": self._environment()}

    def _environment(self) -> dict[str, Any]:
        device = jax.devices()[0]
        return {
            "jax": jax.__version__,
            "device": device.device_kind,
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "parameters": cases.count(self.shapes),
            **{name: _version(name) for name in ("optax", "torch", "libtpu")},
        }

    def run(self, parts: Sequence[str]) -> dict[str, Any]:
        """Runs the parts and returns all results."""
        environment = ", ".join(f"{k} {v}" for k, v in self.results["environment"].items() if v)
        self.console.print(environment)
        for part in (part for part in PARTS if part in parts):
            with self.console.status(part) as status:
                getattr(self, f"run_{part}")(
                    lambda name, s=status, p=part: s.update(f"{p}: {name}")
                )
        self._finish_storage()
        rows = budgets(self.results)
        tables.print_budgets(self.console, rows)
        self.results["budgets"] = [vars(row) | {"verdict": row.verdict} for row in rows]
        return self.results

    def run_cpu(self, say: Callable[[str], None]) -> None:
        """Times optimizers on the CPU."""
        cpu = jax.devices("cpu")[0]
        self._time("cpu", cpu, say)
        with jax.default_device(cpu):
            self.results["sampled_share"] = timing.sampled_share(self.shapes)

    def run_accelerator(self, say: Callable[[str], None]) -> None:
        """Times optimizers on the accelerator, where there is one."""
        device = jax.devices()[0]
        if device.platform == "cpu":
            self._skip("No accelerator seen by JAX (for a GPU: the 'cuda' extra): no times of one.")
            return
        self._time(device.platform, device, say)

    def _time(self, name: str, device: Any, say: Callable[[str], None]) -> None:
        rows = timing.time_steps(self.shapes, self.rounds, device, say)
        self.results[name] = rows
        size = cases.count(self.shapes) / 1e6
        title = f"Times on {device.device_kind}, {size:.0f} M float32 parameters"
        tables.print_times(self.console, title, rows)

    def run_torch(self, say: Callable[[str], None]) -> None:
        """Times the published algorithm in torch on the CPU."""
        self._time_published("cpu", say)

    def run_torch_gpu(self, say: Callable[[str], None]) -> None:
        """Times the published algorithm in torch on the GPU, where torch sees one."""
        self._time_published("cuda", say)

    def _time_published(self, device: str, say: Callable[[str], None]) -> None:
        if importlib.util.find_spec("torch") is None:
            self._skip("No torch here (install a CPU build of it): no times of the published code.")
            return
        from tests.bench import torch_times

        if not torch_times.sees(device):
            self._skip("No GPU seen by torch: no times of the published code on one.")
            return
        say("published algorithm")
        threads, rounds = os.cpu_count() or 1, max(2, self.rounds // 3)
        rows = torch_times.time_published(self.shapes, rounds, threads, device)
        self.results["torch" if device == "cpu" else "torch_gpu"] = rows
        where = {"cpu": "the CPU", "cuda": "the GPU"}[device]
        tables.print_times(self.console, f"The published algorithm in torch, on {where}", rows)

    def run_tpu(self, say: Callable[[str], None]) -> None:
        """Compiles optimizer steps and whole training steps for TPUs."""
        if importlib.util.find_spec("libtpu") is None:
            self._skip("No TPU compiler here (install the 'tpu' extra): no figures for a TPU.")
            return
        compared = cases.cases()
        wanted = (cases.BASELINE, cases.DARE, cases.TIES_EXACT)
        whole = [case for case in compared if case.name in wanted]
        shapes = self.large_shapes
        say("passes of a threshold")
        passes = compiled.search_passes(_largest_tensor(shapes), cases.TIES_DENSITY)
        self.results |= {"threshold_passes": passes, "tpu": {}, "train_step": {}, "leaf_bytes": {}}
        for name in self.topologies:
            rows = compiled.step_figures(name, shapes, compared, passes, say)
            steps = compiled.train_step_figures(name, shapes, whole)
            self.results["tpu"][name], self.results["train_step"][name] = rows, steps
            chips = compiled.make_mesh(name).size
            self.results["leaf_bytes"][name] = compiled.leaf_bytes(shapes, chips)
            tables.print_compiled(self.console, name, rows, passes)
            tables.print_train_step(self.console, name, steps)

    def run_storage(self, say: Callable[[str], None]) -> None:
        """Counts the bytes of every storage and compares where they lead."""
        say("steps with every storage")
        small = cases.parameter_shapes(_STORAGE_RUN_MILLIONS)
        self.results["storage"] = storage.storage_rows(self.shapes, small)

    def _finish_storage(self) -> None:
        """Prints the storage table, once the compiler's figures of the host's memory are there."""
        if "storage" not in self.results:
            return
        for rows in list(self.results.get("tpu", {}).values())[:1]:
            figures = {row["optimizer"]: row for row in rows}
            pinned, plain = figures[cases.PINNED], figures[cases.BASELINE]
            storage.fill_pinned(self.results["storage"], pinned, plain)
        tables.print_storage(self.console, self.results["storage"])

    def _skip(self, reason: str) -> None:
        self.console.print(f"\n{reason}")


def _largest_tensor(shapes: Any) -> int:
    """Returns the entries of the largest tensor, but no more than can be drawn in a moment."""
    return min(2**26, max(leaf.size for leaf in jax.tree.leaves(shapes)))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
