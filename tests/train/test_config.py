"""Ranges of the settings."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from tests.train.builders import GOOD
from train.config import (
    AdamWOptions,
    DPOConfig,
    EarlyStopOptions,
    GroupRewardOptions,
    MergeConfig,
    MergeModelOptions,
    TaskSetOptions,
    TextOptions,
    UserError,
    check_settings,
    flatten,
)


def changed(field: str, value) -> DPOConfig:
    group, name = field.split(".")
    part = dataclasses.replace(getattr(GOOD, group), **{name: value})
    return dataclasses.replace(GOOD, **{group: part})


def test_good_settings_pass():
    check_settings(GOOD)
    check_settings(changed("data.mix", {"more.jsonl": 0.5}))


def test_mixtures_name_what_is_wrong():
    with pytest.raises(UserError, match=r"data\.mix\['x\.jsonl'\] must be positive, got 0"):
        check_settings(changed("data.mix", {"x.jsonl": 0}))
    with pytest.raises(UserError, match=r"data\.mix must be of other data sets than data\.path"):
        check_settings(changed("data.mix", {"pairs.jsonl": 1.0}))


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("loss.beta", 0.0, "positive"),
        ("loss.beta", float("nan"), "positive"),
        ("loss.label_smoothing", 0.5, "in [0, 0.5)"),
        ("loss.vocab_chunk", 0, "positive"),
        ("optimizer.learning_rate", -1e-6, "positive"),
        ("optimizer.weight_decay", -0.1, "0 or larger"),
        ("optimizer.max_grad_norm", -1.0, "0 or larger"),
        ("optimizer.b1", 1.0, "in [0, 1)"),
        ("optimizer.eps", 0.0, "positive"),
        ("optimizer.seed", -1, "in [0, 2**32)"),
        ("trainer.seed", 2**32, "in [0, 2**32)"),
        ("data.buckets", 0, "positive"),
        ("optimizer.b2", -0.1, "in [0, 1)"),
        ("schedule.warmup_steps", -1, "0 or larger"),
        ("schedule.final_scale", 1.5, "in [0, 1]"),
        ("data.eval_fraction", 1.0, "between 0 and 1"),
        ("data.max_prompt_length", 0, "positive"),
        ("data.max_completion_length", -5, "positive"),
        ("trainer.batch_size", 0, "positive"),
        ("trainer.steps", 0, "positive"),
        ("trainer.eval_batch_size", 0, "positive"),
        ("trainer.eval_every", 0, "positive"),
        ("trainer.save_every", 0, "positive"),
        ("trainer.keep", 0, "positive"),
        ("trainer.log_every", 0, "positive"),
        ("mesh.fsdp", 0, "positive"),
        ("mesh.fsdp", None, None),
        ("loss.vocab_chunk", "auto", None),
        ("loss.vocab_chunk", "all", "an integer"),
        ("trainer.epochs", float("inf"), "finite"),
        ("trainer.batch_size", None, "an integer"),
        ("trainer.batch_size", 2.5, "an integer"),
        ("trainer.batch_size", True, "an integer"),
        ("optimizer.learning_rate", "1e-6", "a number"),
        ("optimizer.learning_rate", float("inf"), "finite"),
        ("optimizer.weight_decay", float("nan"), "0 or larger"),
        ("optimizer.learning_rate", np.float32(1e-6), None),
        ("trainer.seed", np.int64(3), None),
        ("distributed.heartbeat_timeout", 9, "10 or larger"),
    ],
)
def test_ranges(field, value, expected):
    config = changed(field, value)
    if expected is None:
        check_settings(config)
        return
    with pytest.raises(UserError) as caught:
        check_settings(config)
    assert str(caught.value) == f"{field} must be {expected}, got {value!r}."


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            EarlyStopOptions(metric="eval_loss", floors={"eval_rewards/margins": math.nan}),
            "stop.floors['eval_rewards/margins'] must be a finite number, got nan.",
        ),
        (GroupRewardOptions(function="a:b", weights=[math.inf]), "stop.weights[0] must be finite"),
        (
            TaskSetOptions(texts={"wiki": TextOptions(path="wiki.txt", stride=0)}),
            "stop.texts.wiki.stride must be positive, got 0.",
        ),
        (
            MergeConfig(
                method="linear", models=[MergeModelOptions(path="a", density=0.0)], output="o"
            ),
            "stop.models[0].density must be in (0, 1], got 0.0.",
        ),
    ],
)
def test_ranges_in_dictionaries_and_lists(settings, message):
    with pytest.raises(UserError) as caught:
        check_settings(settings, "stop")
    assert str(caught.value).startswith(message)


def test_settings_of_a_reference_that_stays():
    for field, value in {"ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 4}.items():
        with pytest.raises(
            UserError, match=f"{field} is set to {value}, but sync_ref_model is not"
        ):
            check_settings(dataclasses.replace(GOOD, **{field: value}))
        check_settings(dataclasses.replace(GOOD, sync_ref_model=True, **{field: value}))


def test_parameters_in_float16():
    with pytest.raises(UserError, match=r"model\.param_dtype is float16.*use float32"):
        check_settings(changed("model.param_dtype", "float16"))
    check_settings(changed("model.dtype", "float16"))
    check_settings(changed("model.param_dtype", "bfloat16"))


def test_two_ways_to_hold_out():
    with pytest.raises(UserError, match=r"data\.eval_path and data\.eval_fraction are both set"):
        check_settings(changed("data.eval_path", "held_out.jsonl"))


def test_split_of_nothing():
    with pytest.raises(
        UserError, match=r"data\.eval_split is 'test', but there is no data\.eval_path"
    ):
        check_settings(changed("data.eval_split", "test"))


def test_interval_of_evaluations_without_records():
    config = changed("data.eval_fraction", None)
    check_settings(config)
    trainer = dataclasses.replace(GOOD.trainer, eval_every=5)
    with pytest.raises(UserError, match=r"trainer\.eval_every is 5, but .* nothing to evaluate on"):
        check_settings(dataclasses.replace(config, trainer=trainer))
    check_settings(dataclasses.replace(GOOD, trainer=trainer))


def test_final_scale_of_a_constant_rate():
    config = changed("schedule.final_scale", 0.1)
    check_settings(config)
    schedule = dataclasses.replace(config.schedule, type="constant")
    with pytest.raises(UserError, match=r"schedule\.final_scale is 0\.1, but a constant schedule"):
        check_settings(dataclasses.replace(config, schedule=schedule))
    check_settings(changed("schedule.type", "constant"))


@pytest.mark.parametrize("values", [{"steps": None}, {"epochs": 1.0}])
def test_length_of_the_run_is_given_once(values):
    trainer = dataclasses.replace(GOOD.trainer, **values)
    with pytest.raises(UserError, match=r"exactly one of trainer\.steps and trainer\.epochs"):
        check_settings(dataclasses.replace(GOOD, trainer=trainer))


def test_flatten_names_every_field():
    flat = flatten(GOOD)
    assert flat["optimizer.learning_rate"] == 1e-6
    assert flat["output_dir"] == "out"
    groups = (
        GOOD.model,
        GOOD.data,
        GOOD.optimizer,
        GOOD.trainer,
        GOOD.loss,
        GOOD.schedule,
        GOOD.mesh,
        GOOD.distributed,
        GOOD.evaluation,
    )
    assert len(flat) == 6 + sum(len(dataclasses.fields(group)) for group in groups)
    assert set(flatten(AdamWOptions(learning_rate=1.0))) < {
        name.removeprefix("optimizer.") for name in flat
    }
