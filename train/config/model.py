"""Which model a command reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from train.config import ranges
from train.config.base import DType, UserError

RematPolicy = Literal["none", "full", "dots", "weight_dots"]


def _all_linear() -> list[str]:
    return ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Low-rank adapters; nothing else is trained.

    Attributes:
        rank: Columns of A and rows of B.
        alpha: The adapters' product is multiplied by alpha / rank.
        target_modules: Linear layers that get one, by their names in PEFT.
        seed: Seed of the draw of A; B starts at 0.
        adapter: Directory with adapter_config.json and adapter_model.safetensors to start from; its
            rank, alpha and modules must be those above. It is part of the reference, and the merging
            optimizers take it as the delta.
    """

    rank: ranges.PositiveInt = 16
    alpha: ranges.PositiveFloat = 32.0
    target_modules: list[str] = field(default_factory=_all_linear)
    seed: ranges.Seed = 0
    adapter: str | None = None


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
        attention: Program of the attention: xla; or flash attention, without a matrix of all pairs of
            positions: cudnn (an NVIDIA GPU and dtype bfloat16), or splash (a TPU; preference pairs
            need data.prefix_sharing false).
        export_dtype: Type of the exported weights. Unset: as stored at `path`, so float32 results
            of a bfloat16 model are rounded.
        lora: Train low-rank adapters alone. Exported are the model with them merged in, and the
            adapters in PEFT's format.
        freeze: Regular expressions. A parameter is not trained where one of them is found in its dotted
            path, such as layers.self_attn.q_proj.kernel or embed_tokens.
        trainable: Regular expressions. Only parameters are trained in whose path one of them is found.
    """

    path: str
    dtype: DType = "float32"
    param_dtype: DType = "float32"
    remat: RematPolicy = "none"
    attention: Literal["xla", "cudnn", "splash"] = "xla"
    export_dtype: DType | None = None
    lora: LoraOptions | None = None
    freeze: list[str] = field(default_factory=list)
    trainable: list[str] | None = None

    def check_together(self, name: str) -> None:
        """Refuses moments in float16. Raises `UserError`."""
        if self.param_dtype == "float16":
            raise UserError(
                f"{name}.param_dtype is float16, in which the optimizer's moments underflow; use "
                f"float32 ({name}.dtype may be lower)."
            )


@dataclass(frozen=True, kw_only=True)
class PolicyOptions(ModelOptions):
    """The aligned model: its start (which is also the reference), and the model before fine-tuning.

    Attributes:
        base: Directory or hub name of the pre-trained model behind `path`. The merging optimizers
            (without lora.adapter) need it for the delta `path` − `base`; the others do not accept it.
    """

    base: str | None = None
