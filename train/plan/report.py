"""Prints a plan as tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Column, Table

from train.plan.figures import Memory, Plan


def show(plan: Plan, plain: Plan | None, advised: Sequence[str], console: Console) -> None:
    """Prints a plan, beside one without merging where `plain` is given, and the advice."""
    plans = [plan] if plain is None else [plan, plain]
    size = " x ".join(f"{axis} {count}" for axis, count in plan.mesh.items())
    slices = f" in {plan.target.slices} slices" if plan.target.slices > 1 else ""
    console.print(f"\n{plan.target.topology}: {plan.target.chips} chips{slices}, mesh {size}")
    if plan.source == "arithmetic":
        console.print(
            "There is no compiler for this machine here: the state is exact; temporaries, FLOPs and "
            "collectives are arithmetic."
        )
    console.print(_memory_table(plans))
    if plan.source == "state":
        held = plan.memory.state.total / 1e9
        console.print(f"{held:.1f} GB are held from step to step; so nothing was compiled.")
    elif plan.work is None:
        console.print("The compiler refused the program, and gave no figures of its work.")
    else:
        console.print(_work_table(plans))
        _show_times(plan, console)
    _show_verdict(plan, advised, console)


def _memory_table(plans: Sequence[Plan]) -> Table:
    table = _table("memory of a chip", "GB", len(plans) > 1)
    temporaries = "temporaries" + ("" if plans[0].source == "compiler" else " (arithmetic)")
    rows: dict[str, Callable[[Memory], float]] = {
        "parameters": lambda m: m.state.parameters,
        "optimizer": lambda m: m.state.optimizer,
        "delta": lambda m: m.state.delta,
        "batch": lambda m: m.state.batch,
        "padding of layouts": lambda m: m.padding,
        temporaries: lambda m: m.temporaries,
        "program": lambda m: m.program,
        "total": lambda m: m.total,
    }
    if plans[0].memory.state.on_host:
        rows["besides, in the host's memory"] = lambda m: m.state.on_host
    for name, part in rows.items():
        table.add_row(name, *_compared([part(plan.memory) / 1e9 for plan in plans]))
    return table


def _work_table(plans: Sequence[Plan]) -> Table:
    table = _table("a step of a chip", "", len(plans) > 1)
    works = [plan.work for plan in plans if plan.work is not None]
    table.add_row("TFLOPs of products", *_compared([work.flops / 1e12 for work in works]))
    if works[0].hbm_bytes is not None:
        table.add_row("memory traffic, GB", *_compared([(w.hbm_bytes or 0) / 1e9 for w in works]))
    for where, sums in {
        "": [work.sent for work in works],
        " over the network": [work.network for work in works],
    }.items():
        for kind in sorted(sums[0], key=lambda kind: -sums[0][kind]):
            values = [sent.get(kind, 0.0) / 1e9 for sent in sums]
            if values[0] >= 1e-3:
                table.add_row(f"{kind}{where}, GB", *_compared(values))
    return table


def _table(title: str, unit: str, compares: bool) -> Table:
    headers = (unit, "without merging", "merge's share") if compares else (unit,)
    columns = [Column(header, justify="right") for header in headers]
    return Table("", *columns, title=title, title_justify="left")


def _compared(values: Sequence[float]) -> list[str]:
    """The values of a row, and where there are two the share of the first that the second lacks."""
    shown = [f"{value:,.3f}" if abs(value) < 10 else f"{value:,.1f}" for value in values]
    if len(values) < 2:
        return shown
    if abs(values[0]) < 5e-4:
        return [*shown, ""]
    return [*shown, f"{100 * (values[0] - values[1]) / values[0]:.1f}%"]


def _show_times(plan: Plan, console: Console) -> None:
    times, work = plan.roofline, plan.work
    if times is not None:
        parts = [f"products {times.compute:.3f} s", f"memory {times.hbm:.3f} s"]
        if work is not None and work.hbm_bytes is None:
            parts[1] = "memory not counted"
        parts.append(f"interconnect {times.interconnect:.3f} s")
        if times.network:
            parts.append(f"network {times.network:.3f} s")
        console.print(
            f"At the peaks: {', '.join(parts)}. A step takes at least {times.step:.3f} s "
            f"({times.bound}), and uses at most {100 * times.mfu:.0f}% of the peak (MFU)."
        )
    if work is not None and work.uncounted_loops:
        console.print(
            f"{work.uncounted_loops} loops of unknown length, such as searches for a threshold, count "
            "once."
        )
    if work is not None and work.uncounted_kernels:
        console.print(
            f"What {work.uncounted_kernels} kernels of their own compute and move is not counted."
        )


def _show_verdict(plan: Plan, advised: Sequence[str], console: Console) -> None:
    total, hbm = plan.memory.total / 1e9, plan.target.hbm
    if hbm is None:
        console.print(f"A device needs {total:.2f} GB; the memory of this machine is shared.")
    elif plan.fits:
        console.print(
            f"It fits: {total:.1f} of {hbm / 1e9:.0f} GB ({100 * total * 1e9 / hbm:.0f}%)."
        )
    else:
        console.print(
            f"It does not fit: {total:.1f} GB, and a chip has {hbm / 1e9:.0f} GB. Change:"
        )
        for line in advised:
            console.print(f"  {line}")
