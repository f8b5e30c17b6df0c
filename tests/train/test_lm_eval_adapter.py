"""Requests of lm-evaluation-harness get the answers of its own model for transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.tiny_runs import make_model_dir, write_jsonl

pytest.importorskip("lm_eval", reason="lm_eval is not installed; `pip install lm_eval`")
huggingface = pytest.importorskip("lm_eval.models.huggingface")
instances = pytest.importorskip("lm_eval.api.instance")
adapter = pytest.importorskip("train.evaluation.lm_eval_adapter")

LENGTH = 48


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Ours and theirs on one model."""
    path = str(make_model_dir(tmp_path_factory.mktemp("model"), 3))
    # As in real directories, generation ends with the tokenizer's own end token.
    (Path(path) / "generation_config.json").write_text('{"eos_token_id": 1, "pad_token_id": 1}')
    hf = huggingface.HFLM(
        pretrained=path, device="cpu", batch_size=3, dtype="float32", max_length=LENGTH
    )
    return adapter.DecoderLM(path, batch_size=3, max_length=LENGTH), hf


def requests(kind: str, arguments: list[tuple]) -> list:
    return [
        instances.Instance(request_type=kind, doc={}, arguments=args, idx=number)
        for number, args in enumerate(arguments)
    ]


def test_loglikelihood(both):
    pairs = [
        ("The sky is", " blue"),
        ("The sky is ", "green, and so on"),  # the space belongs to the continuation
        ("", "No context at all"),
        ("<|im_start|>user", " already has BOS"),
        ("A context that is longer than the model may see, by far; " * 2, " end"),
        ("x", "y"),
    ]
    ours, theirs = (lm.loglikelihood(requests("loglikelihood", pairs), True) for lm in both)
    for (logp, greedy), (expected, most_likely) in zip(ours, theirs, strict=True):
        assert logp == pytest.approx(expected, rel=1e-5)
        assert greedy == most_likely


def test_the_most_likely_continuation_is_greedy(both):
    (written,) = both[1].generate_until(
        requests("generate_until", [("A prompt", {"max_gen_toks": 3, "until": []})]), True
    )
    if "\ufffd" in written:
        pytest.skip("not a text that can be encoded again")
    pair = requests("loglikelihood", [("A prompt", written)])
    assert both[0].loglikelihood(pair, True)[0][1] == both[1].loglikelihood(pair, True)[0][1]


def test_loglikelihood_rolling(both):
    texts = [("Short.",), ("Longer than one window of the model, so that it is cut. " * 3,), ("z",)]
    ours, theirs = (
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", texts), True) for lm in both
    )
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_generate_until(both):
    settings = {"until": ["\n\n", "Q:"], "max_gen_toks": 8, "do_sample": False}
    prompts = [("1+1=", settings), ("The sky", settings), ("and", {**settings, "max_gen_toks": 5})]
    prompts += [("A context that is longer than the model may see, by far", settings)]
    ours, theirs = (lm.generate_until(requests("generate_until", prompts), True) for lm in both)
    assert ours == theirs
    assert len(set(ours)) == len(ours)
    # A text that the model writes as a stop.
    stop = ours[0][2]
    wanted = [ours[0].split(stop)[0]]
    cut = requests("generate_until", [("1+1=", {**settings, "until": stop})])
    assert both[0].generate_until(cut, True) == both[1].generate_until(cut, True) == wanted


def test_a_task_that_samples_is_refused(both):
    sampled = requests("generate_until", [("x", {"do_sample": True, "temperature": 0.7})])
    with pytest.raises(ValueError, match="only greedy generation"):
        both[0].generate_until(sampled, True)


def test_a_whole_task(both, tmp_path):
    """A task of the harness itself, from its own code: choices over a local file."""
    lm_eval = pytest.importorskip("lm_eval")
    rows = [{"q": "2+2?", "c": ["3", "four"], "a": 1}, {"q": "Sky?", "c": ["b", "g"], "a": 0}]
    file = write_jsonl(tmp_path / "q.jsonl", rows)
    config = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(file)},
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{q}}\nA:",
        "doc_to_choice": "{{c}}",
        "doc_to_target": "a",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    results = [
        lm_eval.simple_evaluate(lm, tasks=[config], bootstrap_iters=0)["results"]["tiny"]
        for lm in both
    ]
    for name in ("acc,none", "acc_norm,none"):
        assert results[0][name] == results[1][name]
