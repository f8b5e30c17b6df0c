"""Settings of every command as dataclasses; their docstrings are the command line's help.

A settings file (YAML) and flags fill the same fields: ``--trainer.steps 10`` is ``trainer: {steps:
10}``. Nothing heavy is imported here, so that ``--help`` and a misspelt field answer at once. The
ranges are checked by `check`, which every command calls before it reads a weight; fields that
belong to one optimizer are checked in `train.optimizers`.
"""

from train.config.base import DType, UserError, flatten, require
from train.config.commands import FREE_FIELDS, DPOConfig, ExportConfig, KTOConfig, SFTConfig
from train.config.data import DataOptions, RecordOptions, check_records
from train.config.evaluation import (
    ChoiceTaskOptions,
    EvalConfig,
    ExactMatchOptions,
    PerplexityOptions,
    PreferenceEvalOptions,
    TaskOptions,
)
from train.config.generation import GenerateConfig
from train.config.loss import PreferenceLossOptions, SFTLossOptions, UnpairedLossOptions
from train.config.merging import MergeConfig, MergeModelOptions
from train.config.model import ModelOptions, PolicyOptions
from train.config.optimizer import AdamWOptions, OptimizerName, OptimizerOptions, ScheduleOptions
from train.config.ranges import check
from train.config.trainer import EarlyStopOptions, TrainerOptions

__all__ = [
    "FREE_FIELDS",
    "AdamWOptions",
    "ChoiceTaskOptions",
    "DPOConfig",
    "DType",
    "DataOptions",
    "EarlyStopOptions",
    "EvalConfig",
    "ExactMatchOptions",
    "ExportConfig",
    "GenerateConfig",
    "KTOConfig",
    "MergeConfig",
    "MergeModelOptions",
    "ModelOptions",
    "OptimizerName",
    "OptimizerOptions",
    "PerplexityOptions",
    "PolicyOptions",
    "PreferenceEvalOptions",
    "PreferenceLossOptions",
    "RecordOptions",
    "SFTConfig",
    "SFTLossOptions",
    "ScheduleOptions",
    "TaskOptions",
    "TrainerOptions",
    "UnpairedLossOptions",
    "UserError",
    "check",
    "check_records",
    "flatten",
    "require",
]
