"""The examples of the docstrings run."""

import doctest
import importlib
import pkgutil

import pytest

import omerge_jax

MODULES = [m.name for m in pkgutil.walk_packages(omerge_jax.__path__, "omerge_jax.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    import jax.numpy as jnp

    results = doctest.testmod(module, extraglobs={"jnp": jnp})
    assert results.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    modules = [importlib.import_module(name) for name in MODULES]
    assert sum(len(t.examples) for m in modules for t in finder.find(m)) > 20
