"""The decoder as a model of lm-evaluation-harness, next to the harness's own HFLM."""

from __future__ import annotations

import numpy as np
import pytest

from tests.train.tiny_runs import make_model_dir

pytest.importorskip("lm_eval", reason="lm_eval is not installed; it comes with the extra `eval`")
instance = pytest.importorskip("lm_eval.api.instance")
huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="HFLM needs accelerate")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    from train.lm_eval_adapter import DecoderLM

    path = str(make_model_dir(tmp_path_factory.mktemp("model"), 5))
    options = {"batch_size": 2, "max_length": 96}
    theirs = huggingface.HFLM(path, device="cpu", dtype="float32", **options)
    return DecoderLM(path, **options), theirs


def requests(kind, arguments):
    return [instance.Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_loglikelihood(both):
    pairs = [("2+2=", " 4"), ("", "Hello there"), ("a " * 80, "long context"), ("x", " y z")]
    ours, theirs = (lm.loglikelihood(requests("loglikelihood", pairs)) for lm in both)
    np.testing.assert_allclose([a for a, _ in ours], [a for a, _ in theirs], rtol=1e-4)
    assert [b for _, b in ours] == [b for _, b in theirs]


def test_loglikelihood_rolling(both):
    texts = [("Short text.",), ("words and " * 9,)]
    ours, theirs = (
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", texts)) for lm in both
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_generate_until(both):
    options = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    prompts = [("One, two,", options), ("The", options), ("A longer prompt, it is", options)]
    ours, theirs = (lm.generate_until(requests("generate_until", prompts)) for lm in both)
    assert ours == theirs


def test_chat_template(both):
    history = [{"role": "user", "content": "Hi"}]
    assert both[0].apply_chat_template(history) == both[1].apply_chat_template(history)
