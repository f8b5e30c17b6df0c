"""Types that several parts of the trainer share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

Params = dict[str, Any]
"""Parameters of a model as a nested dict of arrays, from `train.models.split_model`."""

State = dict[str, Any]
"""A training state, from `train.training.step.init_state`."""

Batch = Mapping[str, Any]
"""Columns by name, each with the rows of the batch on axis 0."""

Prepared = tuple[dict[str, np.ndarray], dict[str, float]]
"""A batch as a step takes it, and the metrics that are logged about it."""

Metrics = dict[str, jax.Array]
"""Scalars by the name under which they are logged."""

LossFn = Callable[[Any, Batch], tuple[jax.Array, Metrics]]
"""``loss_fn(params, batch) -> (loss, metrics)``."""

Score = Callable[[Any, Any], tuple[jax.Array, ...]]
"""``score(params, batch)`` gives log-probabilities of every kind of answer, each float32 ``[rows]``."""

Evaluate = Callable[[Any], dict[str, float]]
"""``evaluate(params)`` gives held-out metrics by name."""
