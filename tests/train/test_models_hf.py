import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.train.tiny_models import CASES, padded_batch, save_model, transformers_logits
from train.models import (
    check_hf_compatible,
    from_hf,
    merge_model,
    read_hf_config,
    resolve_model_dir,
    split_model,
    to_hf,
)
from train.models.safetensors_dir import SafetensorsDir

FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16)


def stored(directory):
    """Every tensor of a directory as (dtype, shape, bytes)."""
    tensors = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as handle:
            for name in handle.keys():  # noqa: SIM118
                tensor = handle.get_tensor(name)
                assert name not in tensors
                tensors[name] = (str(tensor.dtype), tensor.shape, tensor.tobytes())
    return tensors


def rewrite(directory, change):
    """Applies ``change`` to the tensors of a single-file checkpoint."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors = change(tensors) or tensors
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, file)


def shard(directory, count):
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        save_file({n: tensors[n] for n in names[i::count]}, directory / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(names[i::count], file))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def mix_dtypes(tensors):
    """Neighbouring layers of one parameter get different dtypes; awkward values included."""
    mixed = {}
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        flat = tensor.astype(FLOATS[number % 3]).reshape(-1)
        flat[:4] = np.asarray([-0.0, np.inf, 6e-8, -1e-7]).astype(flat.dtype)
        mixed[name] = flat.reshape(tensor.shape)
    return mixed


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_bitwise(name, tmp_path):
    save_model(name, tmp_path / "in")
    to_hf(from_hf(tmp_path / "in"), tmp_path / "out", like=tmp_path / "in")
    before, after = stored(tmp_path / "in"), stored(tmp_path / "out")
    assert before == after
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "in" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
    with safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as handle:
        assert handle.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", [jnp.float32, None])
def test_round_trip_of_mixed_dtypes_and_shards_is_bitwise(dtype, tmp_path):
    save_model("qwen3-biases", tmp_path / "in")
    rewrite(tmp_path / "in", mix_dtypes)
    before = stored(tmp_path / "in")
    assert {kind for kind, _, _ in before.values()} == {"float32", "float16", "bfloat16"}
    shard(tmp_path / "in", 3)
    model = from_hf(tmp_path / "in", dtype=dtype)
    to_hf(model, tmp_path / "out", like=tmp_path / "in", max_shard_size=20_000)
    assert stored(tmp_path / "out") == before


def test_stored_dtypes_are_kept_on_request(tmp_path):
    save_model("llama-gqa-theta1e4", tmp_path)
    narrow = {"model.layers.0.mlp.up_proj.weight": np.float16, "model.norm.weight": np.float16}

    def change(tensors):
        return {k: v.astype(narrow.get(k, ml_dtypes.bfloat16)) for k, v in tensors.items()}

    rewrite(tmp_path, change)
    model = from_hf(tmp_path, dtype=None)
    _, params = split_model(model)
    assert params["norm"]["weight"].dtype == jnp.float16
    assert params["layers"]["mlp"]["down_proj"]["kernel"].dtype == jnp.bfloat16
    # Layer 0 is float16 and the others bfloat16; only float32 holds both.
    assert params["layers"]["mlp"]["up_proj"]["kernel"].dtype == jnp.float32
    assert model.config.dtype == jnp.float32
    half = from_hf(tmp_path, dtype=jnp.bfloat16, remat="full")
    assert half.config.remat == "full"
    assert {leaf.dtype for leaf in jax.tree.leaves(split_model(half)[1])} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("name", ["llama-tied", "qwen2-untied"])
def test_changed_weights_load_in_transformers(name, tmp_path, chat_tokenizer):
    save_model(name, tmp_path / "in")
    chat_tokenizer.save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "notes.txt").write_text("not part of the model")
    graphdef, params = split_model(from_hf(tmp_path / "in"))
    model = merge_model(graphdef, jax.tree.map(lambda x: 1.25 * x + 0.01, params))
    out = to_hf(model, tmp_path / "out", like=tmp_path / "in", max_shard_size=30_000)

    sizes = [file.stat().st_size for file in out.glob("model-*-of-*.safetensors")]
    assert len(sizes) > 2
    assert max(sizes) < 35_000
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in stored(out).values())
    assert not (out / "notes.txt").exists()

    theirs = AutoModelForCausalLM.from_pretrained(out).eval()
    tokens, mask = padded_batch([(0, 12), (4, 12)], 12)
    found = np.asarray(model(tokens, mask))
    expected = transformers_logits(theirs, tokens, mask)
    assert np.abs(found - expected)[mask].max() <= 1e-5 * np.abs(expected).max()

    tokenizer = AutoTokenizer.from_pretrained(out)
    text, chat = "The capital of <|im_end|> Rome!", [{"role": "user", "content": "Two plus three?"}]
    assert tokenizer(text).input_ids == chat_tokenizer(text).input_ids
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert rendered == "<|im_start|>user\nTwo plus three?<|im_end|>\n<|im_start|>assistant\n"


def test_output_dtype_can_be_chosen(tmp_path):
    save_model("qwen2-tied", tmp_path / "in")
    model = from_hf(tmp_path / "in")
    out = to_hf(model, tmp_path / "out", like=tmp_path / "in", dtype=jnp.bfloat16)
    assert {kind for kind, _, _ in stored(out).values()} == {"bfloat16"}
    assert read_hf_config(out)["dtype"] == "bfloat16"
    kernel = load_file(tmp_path / "in" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    written = SafetensorsDir(out).read("model.layers.1.mlp.up_proj.weight")
    np.testing.assert_array_equal(written, kernel.astype(ml_dtypes.bfloat16))


def test_tied_output_matrix_is_written_only_where_the_source_has_it(tmp_path):
    save_model("qwen2-tied", tmp_path / "without")
    shutil.copytree(tmp_path / "without", tmp_path / "with")

    def add_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    rewrite(tmp_path / "with", add_head)
    graphdef, params = split_model(from_hf(tmp_path / "with"))
    model = merge_model(graphdef, jax.tree.map(lambda x: 2 * x, params))
    without = stored(to_hf(model, tmp_path / "out1", like=tmp_path / "without"))
    assert set(without) == set(stored(tmp_path / "without"))
    both = stored(to_hf(model, tmp_path / "out2", like=tmp_path / "with"))
    assert set(both) == set(stored(tmp_path / "with"))
    assert both["lm_head.weight"] == both["model.embed_tokens.weight"]

    def untie(tensors):
        tensors["lm_head.weight"] = 2 * tensors["lm_head.weight"]

    rewrite(tmp_path / "with", untie)
    with pytest.raises(ValueError, match=r"tie_word_embeddings true, but lm_head.weight differs"):
        from_hf(tmp_path / "with")


# ------------------------------------------------------------------------------- broken directories


def test_all_wrong_tensors_are_named_before_weights_are_read(tmp_path, monkeypatch):
    save_model("llama-gqa-theta1e4", tmp_path)

    def damage(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        del tensors["lm_head.weight"]
        tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((2, 3), np.float32)
        tensors["model.norm.weight"] = np.ones(47, np.float32)
        tensors["model.embed_tokens.weight"] = np.ones((96, 48), np.int32)

    rewrite(tmp_path, damage)
    shard(tmp_path, 2)
    monkeypatch.setattr(SafetensorsDir, "read", lambda *_: pytest.fail("a weight was read"))
    for check in (from_hf, check_hf_compatible):
        with pytest.raises(ValueError, match=r"do not fit its config.json") as caught:
            check(tmp_path)
        text = str(caught.value)
        assert "2 missing:" in text
        assert "model.layers.1.mlp.up_proj.weight [80, 48]" in text
        assert "lm_head.weight [96, 48]" in text
        assert "1 unexpected:\n  model.layers.3.mlp.up_proj.weight [2, 3] in model-0000" in text
        assert "is [47], expected [48]" in text
        assert "is I32; F32, F16, BF16 are read" in text


def test_long_lists_of_wrong_tensors_are_counted(tmp_path):
    save_model("llama-gqa-theta1e4", tmp_path)
    rewrite(tmp_path, lambda tensors: {"model.norm.weight": tensors["model.norm.weight"]})
    with pytest.raises(ValueError, match=r"29 missing:(\n.*){20}\n  and 9 more$"):
        from_hf(tmp_path)


def test_truncated_and_foreign_files(tmp_path):
    save_model("llama-gqa-theta1e4", tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors \(\d+ bytes\) is truncated or not"):
        from_hf(tmp_path)
    file.write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"\(16 bytes\) is truncated or not a safetensors file"):
        from_hf(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist"):
        from_hf(tmp_path)
    save_model("llama-gqa-theta1e4", tmp_path)
    shard(tmp_path, 3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of the 3 files .*: model-00002-of-00003"):
        from_hf(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match=r"files outside of its directory: \.\./elsewhere"):
        from_hf(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="not a valid index"):
        from_hf(tmp_path)
    index.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        FileNotFoundError, match=r"pytorch_model.bin is a pickle, which is not read"
    ):
        from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        from_hf(tmp_path)
    (tmp_path / "config.json").write_text("3")
    with pytest.raises(ValueError, match="holds a int, not an object"):
        from_hf(tmp_path)


def test_bases_of_another_shape_are_refused(tmp_path):
    save_model("llama-gqa-theta1e4", tmp_path / "a")
    save_model("llama-mha-theta1e4", tmp_path / "b")
    save_model("llama-gqa-theta5e5", tmp_path / "c")
    assert check_hf_compatible(tmp_path / "a", same_shapes_as=tmp_path / "c").rope_theta == 1e4
    with pytest.raises(
        ValueError, match="do not have the same parameters: num_kv_heads is 2 and 6"
    ):
        check_hf_compatible(tmp_path / "a", same_shapes_as=tmp_path / "b")


# ------------------------------------------------------------------------------------------ outputs


def test_output_directory_is_never_overwritten(tmp_path):
    save_model("llama-gqa-theta1e4", tmp_path / "in")
    model = from_hf(tmp_path / "in")
    (tmp_path / "empty").mkdir()
    to_hf(model, tmp_path / "empty", like=tmp_path / "in")
    before = stored(tmp_path / "empty")
    with pytest.raises(FileExistsError, match="empty is not empty; choose another directory"):
        to_hf(model, tmp_path / "empty", like=tmp_path / "in")
    with pytest.raises(FileExistsError, match="is a file; choose another name"):
        to_hf(model, tmp_path / "in" / "config.json", like=tmp_path / "in")
    assert stored(tmp_path / "empty") == before


def test_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    save_model("llama-gqa-theta1e4", tmp_path / "in")
    model = from_hf(tmp_path / "in")
    saved = []

    def full_disk(tensors, file, metadata):
        saved.append(file)
        if len(saved) == 3:
            raise OSError("No space left on device")
        save_file(tensors, file, metadata)

    monkeypatch.setattr("train.models.hf_export.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        to_hf(model, tmp_path / "out", like=tmp_path / "in", max_shard_size=20_000)
    assert len(saved) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_another_network_is_refused_as_pattern(tmp_path):
    save_model("llama-gqa-theta1e4", tmp_path / "a")
    save_model("llama-gqa-theta5e5", tmp_path / "b")
    with pytest.raises(
        ValueError, match=r"another network: rope_theta is 10000.0 in the model and"
    ):
        to_hf(from_hf(tmp_path / "a"), tmp_path / "out", like=tmp_path / "b")
    assert not (tmp_path / "out").exists()


def test_values_that_overflow_the_output_dtype_are_reported(tmp_path):
    save_model("llama-gqa-theta1e4", tmp_path / "in")
    graphdef, params = split_model(from_hf(tmp_path / "in"))
    params["norm"]["weight"] = params["norm"]["weight"].at[:2].set(1e6)
    model = merge_model(graphdef, params)
    with pytest.raises(ValueError, match=r"model.norm.weight holds 2 values beyond .* float16"):
        to_hf(model, tmp_path / "out", like=tmp_path / "in", dtype=np.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# -------------------------------------------------------------------------------------- names, hub


def test_names_that_are_no_directory(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"give the directory that holds config.json"):
        resolve_model_dir(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="missing is not an existing directory"):
        resolve_model_dir(tmp_path / "missing")

    def offline(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"org/name is not an .* ConnectionError: no route"):
        resolve_model_dir("org/name")


def test_hub_downloads_neither_code_nor_pickles(tmp_path, monkeypatch):
    repository = [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "modeling_custom.py",
        "pytorch_model.bin",
        "model.gguf",
        "README.md",
        "original/consolidated.safetensors",
        "onnx/config.json",
    ]
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_model_dir("Qwen/Qwen2.5-0.5B") == tmp_path
    assert asked["name"] == "Qwen/Qwen2.5-0.5B"
    wanted = filter_repo_objects(
        repository,
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert list(wanted) == repository[:9]
