"""Which model a command reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from train.config.base import DType

RematPolicy = Literal["none", "full", "dots", "weight_dots"]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which weights to train and how they are held.

    Attributes:
        path: Directory in Hugging Face format (config.json, *.safetensors, tokenizer), or a hub
            name.
        dtype: Type of the computations (activations).
        param_dtype: Type of the parameters and of the optimizer state, float32 or bfloat16. With
            bfloat16 updates below about 1/512 of a parameter are lost to rounding.
        remat: What the backward pass computes again: none; full (each layer, from its input: least
            memory, about a third more time); dots (all but the results of matrix products); or
            weight_dots (also attention's own products, whose size grows with the length squared).
        export_dtype: Type of the exported weights. Unset: as stored at `path`, so float32 results
            of a bfloat16 model are rounded.
    """

    path: str
    dtype: DType = "float32"
    param_dtype: DType = "float32"
    remat: RematPolicy = "none"
    export_dtype: DType | None = None


@dataclass(frozen=True, kw_only=True)
class PolicyOptions(ModelOptions):
    """The aligned model: its start (which is also the reference), and the model before fine-tuning.

    Attributes:
        base: Directory or hub name of the pre-trained model behind `path`. The merging optimizers
            need it for the delta `path` − `base`; the others do not accept it.
    """

    base: str | None = None
