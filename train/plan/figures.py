"""The figures of a plan, each for one chip and one step unless it says otherwise."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from train.plan.target import Target


@dataclass(frozen=True)
class State:
    """Bytes of what a chip holds from step to step, and of its part of a batch.

    Attributes:
        parameters: The model's parameters.
        optimizer: Moments and counters.
        delta: The reference delta, with the sums and the residuals that a merge keeps; with storage
            recompute the weights of reference and base.
        batch: One batch.
        on_host: The chip's part of a delta that lies in its host's memory, which `total` leaves out.
    """

    parameters: float
    optimizer: float
    delta: float
    batch: float
    on_host: float = 0.0

    @property
    def total(self) -> float:
        """Bytes that the chip holds."""
        return self.parameters + self.optimizer + self.delta + self.batch


@dataclass(frozen=True)
class Memory:
    """What a step needs of a chip's memory, in bytes.

    Attributes:
        state: What is held, by the shapes.
        padding: What the layout of the state's arrays adds to it.
        temporaries: Activations, gradients, gathered weights, and results that replace nothing.
        program: The compiled program.
    """

    state: State
    padding: float
    temporaries: float
    program: float = 0.0

    @property
    def total(self) -> float:
        """Bytes that the step needs."""
        return self.state.total + self.padding + self.temporaries + self.program


@dataclass(frozen=True)
class Work:
    """What a step does.

    Attributes:
        flops: FLOPs of matrix products.
        hbm_bytes: Bytes read from and written to memory; None where they were not counted.
        sent: Bytes that each kind of collective brings from other chips, over the links between them.
        network: Bytes that each kind brings from other slices, or from other hosts of GPUs.
        uncounted_loops: Loops of unknown length, whose body counts once.
        uncounted_kernels: Kernels of their own (Pallas) of which nothing is known.
    """

    flops: float
    hbm_bytes: float | None
    sent: dict[str, float] = field(default_factory=dict)
    network: dict[str, float] = field(default_factory=dict)
    uncounted_loops: int = 0
    uncounted_kernels: int = 0


_BOUNDS = ("compute", "hbm", "interconnect", "network")


@dataclass(frozen=True)
class Roofline:
    """Lower bounds of the time of a step, in seconds, each at the peak of what it is named after.

    Attributes:
        compute: Time of the matrix products.
        hbm: Time of the memory traffic.
        interconnect: Time of the collectives over the links between chips.
        network: Time of what they bring from other slices or hosts.
        mfu: Upper bound of the model's FLOPs utilisation (Chowdhery et al. 2022): what forward and
            backward pass need without recomputation, at the peak, as a share of the step.
    """

    compute: float
    hbm: float
    interconnect: float
    network: float
    mfu: float

    @property
    def step(self) -> float:
        """The largest: everything overlaps."""
        return max(getattr(self, name) for name in _BOUNDS)

    @property
    def bound(self) -> str:
        """The name of the largest."""
        return max(_BOUNDS, key=lambda name: getattr(self, name))


@dataclass(frozen=True)
class Plan:
    """A step of one configuration on one machine.

    Attributes:
        target: The machine.
        mesh: Chips along each axis.
        source: ``"compiler"``; ``"arithmetic"`` where only the state is exact; ``"state"`` where it
            alone exceeds the memory, so that nothing was compiled: temporaries are arithmetic.
        parameters: Number of the model's parameters, over all chips.
        model_flops: FLOPs of a step over all chips, without recomputation.
        memory: What the step needs of a chip's memory.
        work: What a chip does in a step; None where the compiler refused a program that does not fit,
            or was not asked.
    """

    target: Target
    mesh: dict[str, int]
    source: str
    parameters: int
    model_flops: float
    memory: Memory
    work: Work | None

    @property
    def fits(self) -> bool | None:
        """Whether the memory suffices; None where that of a chip is not known."""
        return None if self.target.hbm is None else self.memory.total <= self.target.hbm

    @property
    def roofline(self) -> Roofline | None:
        """Bounds of the time, where the peaks are known."""
        peaks, work = self.target.peaks, self.work
        if peaks is None or work is None:
            return None
        compute = work.flops / peaks.flops
        hbm = (work.hbm_bytes or 0.0) / peaks.hbm_bandwidth
        interconnect = sum(work.sent.values()) / peaks.interconnect
        network = sum(work.network.values()) / peaks.network
        ideal = self.model_flops / (math.prod(self.mesh.values()) * peaks.flops)
        mfu = ideal / max(compute, hbm, interconnect, network)
        return Roofline(compute, hbm, interconnect, network, mfu)

    def as_json(self) -> dict[str, Any]:
        """What is written to a file."""
        memory, roofline = self.memory, self.roofline
        hbm = {**asdict(memory.state), "padding": memory.padding}
        hbm |= {"temporaries": memory.temporaries, "program": memory.program}
        hbm |= {"total": memory.total, "capacity": self.target.hbm}
        times = None if roofline is None else {**asdict(roofline), "step": roofline.step}
        return {
            "topology": self.target.topology,
            "chips": self.target.chips,
            "slices": self.target.slices,
            "mesh": self.mesh,
            "source": self.source,
            "model_parameters": self.parameters,
            "model_flops_of_all_chips": self.model_flops,
            "hbm_bytes_per_chip": hbm,
            "fits": self.fits,
            "step_per_chip": None if self.work is None else asdict(self.work),
            "roofline_seconds": times,
        }
