"""Checkpoints: bit-exact round trips, what stays, and what a killed save leaves behind."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import omerge_jax as om
import train.training.checkpoint
from train.config import UserError
from train.training.checkpoint import Checkpoints, abstract, restore_params
from train.training.step import init_state, state_shardings

TX = optax.chain(optax.adamw(1e-3), om.on_dare(alpha=1e-3, density=0.5, every_k=2))


def make_state(seed: int = 0):
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "w": jax.random.normal(keys[0], (8, 4)),
        "b": jax.random.normal(keys[1], (3,), jnp.bfloat16),
    }
    delta = {"w": jax.random.normal(keys[2], (8, 4)), "b": jnp.ones(3, jnp.bfloat16)}
    return init_state(params, TX, delta)


def assert_same(one, other) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


def test_round_trip_is_bit_exact(tmp_path):
    state, position = make_state(), {"next_index": 7, "epoch": [1, 2]}
    with Checkpoints(tmp_path / "c") as saved:
        assert saved.latest() is None
        saved.save(3, state, position)
        saved.wait()
        assert saved.latest() == 3
    like = abstract(jax.eval_shape(make_state))
    with Checkpoints(tmp_path / "c") as saved:
        restored, found = saved.restore(3, like)
        assert_same(restored, state)
        assert found == position
    assert_same(restore_params(tmp_path / "c", 3, like["params"]), state["params"])


def test_a_delta_on_the_host_comes_back_there_on_one_device(tmp_path):
    tx = optax.chain(optax.adamw(1e-3), om.on_dare(alpha=1e-3, density=0.5, storage="pinned_host"))
    params = {"w": jnp.ones((8, 4)), "b": jnp.ones(3)}

    def start():
        return init_state(params, tx, jax.tree.map(jnp.ones_like, params), delta_on_host=True)

    def kinds(tree):
        return jax.tree.map(lambda leaf: leaf.sharding.memory_kind, tree)

    state, shape = start(), jax.eval_shape(start)
    on_host = [kind for kind in jax.tree.leaves(kinds(state)) if kind == "pinned_host"]
    assert len(on_host) == len(params)  # the delta, and nothing else
    like = abstract(shape, state_shardings(shape, params, delta_on_host=True))
    with Checkpoints(tmp_path) as saved:
        saved.save(1, state, {})
        saved.wait()
        restored = saved.restore(1, like)[0]
    assert kinds(restored) == kinds(like) == kinds(state)
    assert_same(restored, state)


def test_state_may_be_donated_while_it_is_written(tmp_path):
    state = make_state()
    kept = jax.tree.map(np.asarray, jax.device_get(state))
    overwrite = jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0)
    with Checkpoints(tmp_path) as saved:
        saved.save(1, state, {})
        overwrite(state)
        saved.wait()
        assert_same(saved.restore(1, abstract(jax.eval_shape(make_state)))[0], kept)


def test_due_steps_and_kept_ones(tmp_path):
    state = make_state()
    with Checkpoints(tmp_path, every=2, keep=2) as saved:
        assert [step for step in range(1, 8) if saved.due(step)] == [2, 4, 6]
        for step in (2, 4, 6, 7):
            saved.save(step, state, {})
        saved.wait()
        assert saved.steps() == [6, 7]
    with Checkpoints(tmp_path / "never") as saved:
        assert not any(saved.due(step) for step in range(1, 8))


def test_remains_of_a_killed_save_do_not_count(tmp_path):
    with Checkpoints(tmp_path) as saved:
        saved.save(5, make_state(), {})
    remains = tmp_path / "10.orbax-checkpoint-tmp"
    (remains / "state").mkdir(parents=True)
    (remains / "state" / "half.bin").write_bytes(b"half")
    with Checkpoints(tmp_path, read_only=True) as saved:
        assert saved.latest() == 5
    assert remains.exists()  # reading leaves everything as it is
    with Checkpoints(tmp_path, every=5, keep=2) as saved:
        assert saved.latest() == 5
        saved.save(10, make_state(1), {})
        saved.wait()
        assert saved.steps() == [5, 10]
        assert_same(
            saved.restore(10, abstract(jax.eval_shape(make_state)))[0]["params"],
            make_state(1)["params"],
        )
    assert not remains.exists()


def test_other_shapes_are_refused(tmp_path):
    with Checkpoints(tmp_path) as saved:
        saved.save(1, make_state(), {})
    like = abstract(jax.eval_shape(make_state))
    like["params"]["w"] = jax.ShapeDtypeStruct((9, 4), jnp.float32, sharding=like["step"].sharding)
    with (
        Checkpoints(tmp_path) as saved,
        pytest.raises(UserError, match=r"checkpoint 1 in .* cannot be restored"),
    ):
        saved.restore(1, like)


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    """Checkpoints of steps 1, 2 and 3, with other states each."""
    directory = tmp_path_factory.mktemp("three") / "checkpoints"
    with Checkpoints(directory, keep=3) as saved:
        for step in (1, 2, 3):
            saved.save(step, make_state(step), {"step": step})
    return directory


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def largest_file(directory: Path) -> Path:
    files = (path for path in directory.rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(three, tmp_path, damage):
    directory, warnings = tmp_path / "checkpoints", []
    shutil.copytree(three, directory)
    damaged = largest_file(directory / "3")
    damage(damaged)
    left = sorted(path.name for path in (directory / "3").rglob("*"))
    with Checkpoints(directory, keep=3, warn=warnings.append) as saved:
        with pytest.raises(UserError, match=r"checkpoint 3 in .* is damaged"):
            saved.restore(3, abstract(jax.eval_shape(make_state)))
        assert saved.newest_intact() == 2
        state, position = saved.restore(2, abstract(jax.eval_shape(make_state)))
        saved.save(3, make_state(3), {})  # its place is free
        assert saved.wait()
        assert saved.damage(3) is None
    assert_same(state, make_state(2))
    assert position == {"step": 2}
    assert len(warnings) == 1
    assert damaged.name in warnings[0]
    assert "the checkpoint of step 3 is damaged" in warnings[0]
    assert "going back to the one of step 2" in warnings[0]
    aside = tmp_path / "damaged-checkpoints" / "3"
    assert sorted(path.name for path in aside.rglob("*")) == left  # nothing is deleted


def test_a_resume_reads_all_bytes_once_for_their_checksums(three, tmp_path, monkeypatch):
    directory, asked = tmp_path / "checkpoints", []
    shutil.copytree(three, directory)
    find_damage = train.training.checkpoint.find_damage
    monkeypatch.setattr(
        "train.training.checkpoint.find_damage",
        lambda path, *which: asked.append(path.name) or find_damage(path, *which),
    )
    like = abstract(jax.eval_shape(make_state))
    with Checkpoints(directory, keep=3) as saved:
        assert saved.newest_intact() == 3
        saved.restore(3, like)
        assert asked == ["3"]
        flip(largest_file(directory / "3"))
        with pytest.raises(UserError, match=r"checkpoint 3 in .* is damaged"):
            saved.restore(3, like)  # which does not rely on what was found before
    assert asked == ["3", "3"]


def test_names_of_damaged_checkpoints_never_clash(three, tmp_path):
    directory = tmp_path / "checkpoints"
    for _ in range(3):
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(three, directory)
        flip(largest_file(directory / "3"))
        with Checkpoints(directory, keep=3, warn=lambda message: None) as saved:
            assert saved.newest_intact() == 2
    aside = tmp_path / "damaged-checkpoints"
    assert sorted(path.name for path in aside.iterdir()) == ["3", "3-1", "3-2"]


def test_all_damaged_is_an_error_that_moves_nothing(three, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(three, directory)
    for step in "123":
        cut(largest_file(directory / step))
    with (
        Checkpoints(directory, keep=3) as saved,
        pytest.raises(UserError, match=r"every checkpoint .* is damaged \(step 3: .*; step 1: "),
    ):
        saved.newest_intact()
    assert sorted(path.name for path in directory.iterdir()) == ["1", "2", "3"]


def test_named_steps_stay(tmp_path):
    with Checkpoints(tmp_path, keep=1) as saved:
        saved.save(1, make_state(), {})
        for step in (2, 3):
            saved.save(step, make_state(), {}, also_keep={1})
        saved.wait()
        assert saved.steps() == [1, 3]
        saved.save(4, make_state(), {})
        saved.wait()
        assert saved.steps() == [4]


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for one checkpoint and a half."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def make_large_state():
    return init_state({"w": jax.random.normal(jax.random.key(0), (32_000,))}, optax.adamw(1e-3))


def test_full_disk_costs_the_new_checkpoint_alone(small_disk, capfd):
    warnings: list[str] = []
    state = make_large_state()
    with Checkpoints(small_disk / "c", keep=1, warn=warnings.append) as saved:
        saved.save(1, state, {})
        assert saved.wait()
        for step in (2, 3):
            (small_disk / "filler").write_bytes(os.urandom(150_000))
            saved.save(step, state, {})
            assert not saved.wait()
            assert saved.steps() == [1]
            assert saved.damage(1) is None
        (small_disk / "filler").unlink()
        saved.save(4, state, {})
        assert saved.wait()  # once there is room, all is well again
        assert saved.steps() == [4]
        assert_same(saved.restore(4, abstract(jax.eval_shape(make_large_state)))[0], state)
    assert warnings == [
        f"the checkpoint of step {step} could not be written (No space left on device); the one of "
        "step 1 stays."
        for step in (2, 3)
    ]
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("when", ["at once", "at the end"])
def test_failed_save_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, when):
    def refuse(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    warnings: list[str] = []
    with Checkpoints(tmp_path, keep=1, warn=warnings.append) as saved:
        saved.save(1, make_state(1), {})
        assert saved.wait()
        with monkeypatch.context() as broken:
            if when == "at once":
                broken.setattr("orbax.checkpoint.CheckpointManager.save", refuse)
            else:
                broken.setattr("train.training.checkpoint.write_manifest", refuse)
            saved.save(2, make_state(2), {})
            saved.wait()
        assert saved.steps() == [1]
        assert saved.damage(1) is None
        saved.save(3, make_state(3), {})
        assert saved.wait()
        assert saved.steps() == [3]
    assert len(warnings) == 1
    assert "step 2 could not be written (No space left on device)" in warnings[0]
