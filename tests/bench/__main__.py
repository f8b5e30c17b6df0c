"""The command line: ``python -m tests.bench``."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# Lets the TPU compiler work on a machine without a TPU, beside other programs that load it. JAX
# reads these when it is imported; where there is a TPU they would hide it.
if not any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0")):
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

from rich.console import Console

from tests.bench.cases import large_shapes
from tests.bench.run import PARTS, Benchmark


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark, prints its tables and writes a JSON file."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="What merging costs next to optax.adamw: times as ratios within one run, and "
        "figures of the TPU compiler, which are exact.",
    )
    parser.add_argument("--millions", type=float, default=61, help="parameters in millions")
    parser.add_argument("--rounds", type=int, default=12, help="pairs of timed steps")
    parser.add_argument(
        "--topologies",
        nargs="+",
        default=["v5p:2x2x1", "v5e:2x2"],
        help="TPU topologies to compile for",
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    parser.add_argument("--output", type=Path, default=Path("bench.json"), help="JSON to write")
    args = parser.parse_args(arguments)
    # Tables are not to be folded where they go to a file.
    console = Console(width=None if sys.stdout.isatty() else 160)
    benchmark = Benchmark(
        console,
        millions=args.millions,
        rounds=args.rounds,
        topologies=args.topologies,
        large_shapes=large_shapes(),
    )
    results = benchmark.run(args.only)
    args.output.write_text(json.dumps(results, indent=2) + "\n")
    console.print(f"\nwrote {args.output}")


if __name__ == "__main__":
    main()
