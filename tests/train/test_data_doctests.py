import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name", ["train.data.formats", "train.data.records", "train.losses", "train.logps"]
)
def test_examples_in_docstrings(name):
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert attempted > 0
    assert failed == 0
