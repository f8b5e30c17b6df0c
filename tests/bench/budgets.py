"""Limits for the cost of a merge, next to the measured cost."""

import dataclasses
from typing import Any

from tests.bench.cases import DARE, TIES_CHAINED, TIES_EXACT, TIES_FUSED_EXACT, TIES_SAMPLED

_SHARE_TOLERANCE = 0.02


@dataclasses.dataclass(frozen=True)
class Budget:
    """A limit.

    Attributes:
      name: name of the limited quantity.
      limit: the largest value allowed.
      measured: the value found; None where that part of the benchmark was left out.
      below: whether the limit itself is too much already.
    """

    name: str
    limit: float
    measured: float | None
    below: bool = False

    @property
    def verdict(self) -> str:
        """Says how the value stands to the limit."""
        if self.measured is None:
            return "not measured"
        within = self.measured < self.limit if self.below else self.measured <= self.limit
        return "ok" if within else "over"


def budgets(results: dict[str, Any]) -> list[Budget]:
    """Returns every budget.

    Args:
      results: the parts of the benchmark by name; those left out are absent.
    """
    rows = _times(_by_name(results.get("cpu", [])))
    rows += _share(results.get("sampled_share"))
    rows += _delta(results.get("storage"))
    for topology, figures in results.get("tpu", {"": []}).items():
        rows += _compiled(topology, _by_name(figures), results)
    return rows


def _by_name(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["optimizer"]: row for row in rows}


def _times(rows: dict[str, dict[str, Any]]) -> list[Budget]:
    exact = {TIES_EXACT: 8.0, TIES_FUSED_EXACT: 8.0}
    limits = {DARE: 1.15, **exact, TIES_CHAINED: 1.6, TIES_SAMPLED: 1.6}
    return [
        Budget(f"CPU time ÷ optax.adamw: {name}", limit, rows.get(name, {}).get("ratio"))
        for name, limit in limits.items()
    ]


def _share(share: dict[str, float] | None) -> list[Budget]:
    deviation = None if share is None else abs(share["kept"] / share["wanted"] - 1)
    worst = None if share is None else share["worst_deviation"]
    name = "share kept by a sampled threshold, off by (relative)"
    return [
        Budget(name, _SHARE_TOLERANCE, deviation),
        Budget(name + ", worst leaf and step", _SHARE_TOLERANCE, worst),
    ]


def _delta(rows: list[dict[str, Any]] | None) -> list[Budget]:
    found = [
        row["device_bytes"]
        for row in rows or []
        if row["density"] <= 0.01 and row["storage"].startswith("sparse")
    ]
    name = "sparse delta at density 0.01, bytes per parameter"
    return [Budget(name, 0.2, max(found) if found else None)]


def _compiled(
    topology: str, rows: dict[str, dict[str, Any]], results: dict[str, Any]
) -> list[Budget]:
    prefix = f"TPU {topology} ".replace("  ", " ")
    leaf = results.get("leaf_bytes", {}).get(topology, 0.0) / 2**20

    def budget(case: str, figure: str, key: str, limit: float, **options: Any) -> Budget:
        measured = rows.get(case, {}).get(key)
        if measured is not None and key == "temp_bytes":
            measured /= 2**20
        return Budget(f"{prefix}{figure}: {case}", limit, measured, **options)

    ratio, temp = ("bytes ÷ optax.adamw", "bytes_ratio"), ("temp MiB", "temp_bytes")
    found = [budget(DARE, *ratio, 1.08), budget(DARE, *temp, 0.0)]
    exact, sampled = (TIES_EXACT, TIES_FUSED_EXACT), (TIES_CHAINED, TIES_SAMPLED)
    for names, limit in ((exact, 3.0), (sampled, 1.5)):
        for case in names:
            found += [budget(case, *ratio, limit), budget(case, *temp, leaf, below=True)]
    return found
