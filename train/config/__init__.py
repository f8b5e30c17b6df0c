"""Settings of every command as dataclasses; their docstrings are the command line's help.

A settings file (YAML) and flags fill the same fields: ``--trainer.steps 10`` is ``trainer: {steps:
10}``. Nothing heavy is imported here, so that ``--help`` and a misspelt field answer at once. The
ranges are checked by `check`, which every command calls before it reads a weight; fields that
belong to one optimizer are checked in `train.optimizers.build`.
"""

from train.config.base import DType, UserError, flatten, require
from train.config.commands import (
    FREE_FIELDS,
    DPOConfig,
    ExportConfig,
    GRPOConfig,
    KTOConfig,
    OnlineDPOConfig,
    SFTConfig,
)
from train.config.data import (
    DataOptions,
    PromptDataOptions,
    RecordOptions,
    SFTDataOptions,
    check_records,
)
from train.config.distributed import DistributedOptions
from train.config.evaluation import (
    EvalConfig,
    GenerationTaskOptions,
    PreferenceEvalOptions,
    TaskOptions,
    TaskSetOptions,
    TextOptions,
)
from train.config.generation import GenerateConfig
from train.config.loss import (
    BetaOptions,
    GroupLossOptions,
    PreferenceLossOptions,
    SFTLossOptions,
    UnpairedLossOptions,
)
from train.config.merge import MergeConfig, MergeModelOptions
from train.config.mesh import MeshOptions
from train.config.model import LoraOptions, ModelOptions, PolicyOptions
from train.config.online import (
    GroupRewardOptions,
    GroupSamplingOptions,
    RewardOptions,
    SamplingOptions,
)
from train.config.optimizer import (
    AdamWOptions,
    AlphaOptions,
    OptimizerName,
    OptimizerOptions,
    ScheduleOptions,
)
from train.config.plan import PlanConfig
from train.config.ranges import check
from train.config.trainer import EarlyStopOptions, EMAOptions, TrainerOptions

__all__ = [
    "FREE_FIELDS",
    "AdamWOptions",
    "AlphaOptions",
    "BetaOptions",
    "DPOConfig",
    "DType",
    "DataOptions",
    "DistributedOptions",
    "EMAOptions",
    "EarlyStopOptions",
    "EvalConfig",
    "ExportConfig",
    "GRPOConfig",
    "GenerateConfig",
    "GenerationTaskOptions",
    "GroupLossOptions",
    "GroupRewardOptions",
    "GroupSamplingOptions",
    "KTOConfig",
    "LoraOptions",
    "MergeConfig",
    "MergeModelOptions",
    "MeshOptions",
    "ModelOptions",
    "OnlineDPOConfig",
    "OptimizerName",
    "OptimizerOptions",
    "PlanConfig",
    "PolicyOptions",
    "PreferenceEvalOptions",
    "PreferenceLossOptions",
    "PromptDataOptions",
    "RecordOptions",
    "RewardOptions",
    "SFTConfig",
    "SFTDataOptions",
    "SFTLossOptions",
    "SamplingOptions",
    "ScheduleOptions",
    "TaskOptions",
    "TaskSetOptions",
    "TextOptions",
    "TrainerOptions",
    "UnpairedLossOptions",
    "UserError",
    "check",
    "check_records",
    "flatten",
    "require",
]
