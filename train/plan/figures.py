"""The figures of a plan, each for one chip and one step unless it says otherwise."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from train.plan.target import Target


@dataclass(frozen=True)
class State:
    """Bytes of what a chip holds from step to step, and of its part of a batch.

    `delta` includes the sums and the residuals that a merge keeps; with storage recompute it is the
    weights of reference and base. A delta `on_host` lies in the host's memory; `total` leaves it out.
    """

    parameters: float
    optimizer: float  # moments and counters
    delta: float
    batch: float
    on_host: float = 0.0

    @property
    def total(self) -> float:
        """Bytes in the chip's memory."""
        return self.parameters + self.optimizer + self.delta + self.batch


@dataclass(frozen=True)
class Memory:
    """Bytes that a step needs of a chip's memory.

    `temporaries` are activations, gradients, gathered weights, and results that replace no argument.
    """

    state: State
    padding: float  # added by the layout of the state's arrays
    temporaries: float
    program: float = 0.0  # the compiled code

    @property
    def total(self) -> float:
        """Bytes that the step needs."""
        return self.state.total + self.padding + self.temporaries + self.program


@dataclass(frozen=True)
class Work:
    """What a chip does in a step.

    `sent` has the bytes that each kind of collective brings from other chips over the links between
    them, `network` those from other slices, or from other hosts of GPUs.
    """

    flops: float  # of matrix products
    hbm_bytes: float | None  # read and written; None where they were not counted
    sent: dict[str, float] = field(default_factory=dict)
    network: dict[str, float] = field(default_factory=dict)
    uncounted_loops: int = 0  # loops of unknown length, whose bodies count once
    uncounted_kernels: int = 0  # custom kernels (Pallas) of unknown cost


_BOUNDS = ("compute", "hbm", "interconnect", "network")


@dataclass(frozen=True)
class Roofline:
    """Lower bounds of the time of a step, in seconds, each at the peak of what it is named after.

    `mfu` is an upper bound of the model's FLOPs utilisation (Chowdhery et al. 2022): the time that
    forward and backward pass need at the peak without recomputation, as a share of the step.
    """

    compute: float
    hbm: float
    interconnect: float
    network: float
    mfu: float

    @property
    def step(self) -> float:
        """The largest bound, as if everything overlapped."""
        return max(getattr(self, name) for name in _BOUNDS)

    @property
    def bound(self) -> str:
        """The name of the largest bound."""
        return max(_BOUNDS, key=lambda name: getattr(self, name))


@dataclass(frozen=True)
class Plan:
    """A step of one configuration on one machine.

    `source` is ``"compiler"``; ``"arithmetic"`` where only the state is exact; or ``"state"`` where the
    state alone exceeds the memory, so that nothing was compiled and temporaries are arithmetic. `work`
    is None where the compiler refused a program that does not fit, or was not asked.
    """

    target: Target
    mesh: dict[str, int]  # chips along each axis
    source: str
    parameters: int  # of the model, over all chips
    model_flops: float  # of a step over all chips, without recomputation
    memory: Memory
    work: Work | None

    @property
    def fits(self) -> bool | None:
        """Whether the memory suffices; None where a chip's memory is not known."""
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
        """The plan's entries in the JSON file."""
        roofline, memory = self.roofline, asdict(self.memory)
        hbm = {**memory.pop("state"), **memory}
        hbm |= {"total": self.memory.total, "capacity": self.target.hbm}
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
