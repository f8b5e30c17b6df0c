"""What merging costs next to ``optax.adamw``: ``make bench``.

Times are ratios within one run, taken in turns, because machines drift; compiler figures are exact.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import omerge_jax as om

BASELINE = "optax.adamw"
LAYERS = 8


def _layer_axes(path: tuple[str, ...]) -> int:
    return int(path[0] == "layers")


def optimizers() -> dict[str, optax.GradientTransformation]:
    """The optimizers that are compared, by name."""
    ties = {"alpha": 5e-7, "layer_axes": _layer_axes}
    return {
        BASELINE: optax.adamw(1e-6),
        "adamw + on_dare p=0.01": optax.chain(optax.adamw(1e-6), om.on_dare(5e-7, 0.01)),
        "adamw + on_ties p=0.1": optax.chain(optax.adamw(1e-6), om.on_ties(density=0.1, **ties)),
        "on_dare_adamw p=0.01": om.on_dare_adamw(1e-6, alpha=5e-7, density=0.01),
        "on_dare_adamw p=0.01, measured": om.on_dare_adamw(
            1e-6, alpha=5e-7, density=0.01, diagnostics=True
        ),
    }


def parameter_shapes(millions: float) -> dict[str, Any]:
    """Shapes like a decoder's with about ``millions`` million parameters, float32."""
    width = int((millions * 1e6 / (LAYERS * 4 + 16)) ** 0.5) // 64 * 64
    leaf = jax.ShapeDtypeStruct
    return {
        "embed": leaf((16 * width, width), jnp.float32),
        "layers": {"up": leaf((LAYERS, width, 4 * width), jnp.float32)},
        "norm": leaf((width,), jnp.float32),
    }


def _step(tx: optax.GradientTransformation) -> Any:
    def step(params: Any, opt_state: Any, grads: Any) -> tuple[Any, Any]:
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return jax.jit(step, donate_argnums=(0, 1))


def _with_delta(opt_state: Any, delta: Any) -> Any:
    takes_delta = bool(om.merge_metrics(opt_state))
    return om.with_delta(opt_state, delta) if takes_delta else opt_state


@dataclasses.dataclass
class Timed:
    """A compiled optimizer with its arrays."""

    step: Callable[..., Any]
    params: Any
    opt_state: Any
    seconds: list[float]

    def run(self, grads: Any) -> None:
        """Takes one step and notes its seconds."""
        start = time.perf_counter()
        self.params, self.opt_state = self.step(self.params, self.opt_state, grads)
        jax.block_until_ready(self.params)
        self.seconds.append(time.perf_counter() - start)


def time_steps(millions: float, rounds: int) -> list[dict[str, Any]]:
    """Times every optimizer next to the baseline, one pair at a time.

    Args:
      millions: parameters in millions.
      rounds: pairs of steps.

    Returns:
      A row per optimizer: median milliseconds, and the median of the ratios pair by pair.
    """
    shapes = parameter_shapes(millions)
    rng = np.random.default_rng(0)

    def arrays(scale: float) -> Any:
        return jax.tree.map(
            lambda s: jnp.asarray(scale * rng.standard_normal(s.shape, np.float32)), shapes
        )

    grads, delta = arrays(1e-3), jax.tree.map(lambda x: x.astype(jnp.bfloat16), arrays(1e-3))

    def prepare(tx: optax.GradientTransformation) -> Timed:
        params = arrays(0.02)
        timed = Timed(_step(tx), params, _with_delta(tx.init(params), delta), [])
        for _ in range(2):
            timed.run(grads)
        timed.seconds.clear()
        return timed

    rows = []
    for name, tx in track(optimizers().items(), description="timing steps"):
        base, other = prepare(optimizers()[BASELINE]), prepare(tx)
        for _ in range(rounds):
            base.run(grads)
            other.run(grads)
        ratios = [b / a for a, b in zip(base.seconds, other.seconds, strict=True)]
        rows.append(
            {
                "optimizer": name,
                "milliseconds": 1e3 * statistics.median(other.seconds),
                "time_ratio": statistics.median(ratios),
            }
        )
    return rows


def tpu_figures(topology: str, millions: float) -> dict[str, dict[str, float]]:
    """Compiles every step ahead of time for a TPU topology.

    Args:
      topology: such as ``v5p:2x2x1``.
      millions: parameters in millions.

    Returns:
      By optimizer: bytes accessed and temporary bytes of the per-chip program. The body of a loop
      (the passes of an exact threshold) is counted once by the compiler.
    """
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    mesh = Mesh(np.array(devices).reshape(-1), ("fsdp",))

    def place(x: Any, dtype: Any = None) -> Any:
        spec = PartitionSpec(*([None] * (x.ndim - 1) + ["fsdp"] if x.ndim > 1 else []))
        return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=NamedSharding(mesh, spec))

    params = jax.tree.map(place, parameter_shapes(millions))
    delta = jax.tree.map(lambda x: place(x, jnp.bfloat16), params)
    figures = {}
    for name, tx in track(optimizers().items(), description=f"compiling for {topology}"):
        state = jax.eval_shape(lambda p, d, tx=tx: _with_delta(tx.init(p), d), params, delta)
        state = jax.tree.map(place, state)
        compiled = _step(tx).lower(params, state, params).compile()
        cost = compiled.cost_analysis()
        memory = compiled.memory_analysis()
        figures[name] = {
            "bytes": float(cost["bytes accessed"]),
            "temp": float(memory.temp_size_in_bytes),
        }
    return figures


def report(rows: list[dict[str, Any]], console: Console) -> None:
    """Prints the rows as a table."""
    table = Table(title="cost of one optimizer step")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(
            column.replace("_", " "), justify="left" if column == "optimizer" else "right"
        )
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    console.print(table)


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else f"{value:.3g}"


def main() -> None:
    """Runs the benchmark and writes a table and a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=float, default=61, help="parameters in millions")
    parser.add_argument("--rounds", type=int, default=15, help="pairs of timed steps")
    parser.add_argument("--topology", default="v5p:2x2x1", help="TPU topology to compile for")
    parser.add_argument("--output", type=Path, default=Path("bench.json"), help="JSON to write")
    args = parser.parse_args()
    console = Console()
    device = jax.devices()[0]
    console.print(f"jax {jax.__version__}, {device.platform} {device.device_kind}")
    rows = time_steps(args.millions, args.rounds)
    if importlib.util.find_spec("libtpu") is None:
        console.print("No TPU compiler here (install the 'tpu' extra): no figures for a TPU.")
    else:
        figures = tpu_figures(args.topology, args.millions)
        for row in rows:
            figure, base = figures[row["optimizer"]], figures[BASELINE]
            row["tpu_bytes_ratio"] = figure["bytes"] / base["bytes"]
            row["tpu_temp_mib"] = figure["temp"] / 2**20
    report(rows, console)
    args.output.write_text(json.dumps({"jax": jax.__version__, "rows": rows}, indent=2) + "\n")
    console.print(f"wrote {args.output}")


if __name__ == "__main__":
    # Lets the TPU compiler work on a machine without a TPU, beside other programs that load it.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    main()
