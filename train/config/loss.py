"""Settings of the losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class SFTLossOptions:
    """Cross-entropy of the answers.

    Attributes:
        vocab_chunk: Work through the vocabulary in pieces of this many entries, so that the logits
            are never held whole; null: all at once; auto: in pieces when the vocabulary is large.
    """

    vocab_chunk: int | Literal["auto"] | None = "auto"


@dataclass(frozen=True, kw_only=True)
class PreferenceLossOptions(SFTLossOptions):
    """Preference loss.

    Attributes:
        type: Name of the loss: sigmoid (DPO), ipo, hinge, ...
        beta: Strength of the pull towards the reference.
        label_smoothing: Assumed share of pairs whose labels are swapped (cDPO); only for the
            sigmoid loss.
    """

    type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
