"""Settings of every command as dataclasses; their docstrings are the command line's help.

A settings file (YAML) and flags fill the same fields: ``--trainer.steps 10`` is ``trainer: {steps:
10}``. Nothing heavy is imported here, so that ``--help`` and a misspelt field answer at once. The
type of a field holds its range. Every command calls `check_settings` before it reads a weight; what
the chosen optimizer has no use for is refused in `train.optimizers.check`.
"""

from train.config.base import DType, UserError, flatten, require
from train.config.commands import (
    FREE_FIELDS,
    DPOConfig,
    ExportConfig,
    GRPOConfig,
    KTOConfig,
    OnlineDPOConfig,
    PlanConfig,
    SFTConfig,
)
from train.config.data import DataOptions, PromptDataOptions, RecordOptions, SFTDataOptions
from train.config.devices import DistributedOptions, MeshOptions
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
    Consensus,
    OptimizerName,
    OptimizerOptions,
    ScheduleOptions,
    Sparsifier,
)
from train.config.ranges import check_settings
from train.config.trainer import EarlyStopOptions, EMAOptions, TrainerOptions
