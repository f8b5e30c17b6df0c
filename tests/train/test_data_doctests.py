import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name",
    [
        "train.data.formats",
        "train.data.packing",
        "train.data.padding",
        "train.data.records",
        "train.data.mismatched",
        "train.objectives.logps",
        "train.losses.preference",
        "train.losses.schedule",
        "train.losses.unpaired",
        "train.models.decoder",
        "train.evaluation.perplexity",
        "train.evaluation.tasks",
        "train.evaluation.text_scores",
        "train.generation.greedy_text",
    ],
)
def test_examples_in_docstrings(name):
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert attempted > 0
    assert failed == 0
