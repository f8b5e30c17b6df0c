"""The safetensors files of a Hugging Face directory, listed from their headers alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {
    "F32": np.dtype(jnp.float32),
    "F16": np.dtype(jnp.float16),
    "BF16": np.dtype(jnp.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A stored tensor; ``dtype_name`` is the one in the file's header, such as ``"BF16"``."""

    file: Path
    shape: tuple[int, ...]
    dtype_name: str

    @property
    def dtype(self) -> np.dtype | None:
        """The NumPy dtype, or None where the decoder cannot hold such numbers."""
        return _DTYPES.get(self.dtype_name)


class SafetensorsDir:
    """The tensors of a directory with ``model.safetensors`` or sharded files and their index.

    Opening reads headers only and lists every tensor by name in ``entries``. Files are
    memory-mapped; pickled weights are never opened.

    Raises:
        FileNotFoundError: no safetensors weights, or a shard that the index names is absent.
        ValueError: a file is truncated or no safetensors file, or the index is not valid.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.entries: dict[str, Entry] = {}
        self._open = {}
        for file in _weight_files(directory):
            try:
                handle = safe_open(file, framework="numpy")
            except SafetensorError as error:
                raise ValueError(
                    f"{file} ({file.stat().st_size} bytes) is truncated or not a safetensors file: "
                    f"{error}. Download it again."
                ) from error
            self._open[file] = handle
            for name in handle.keys():  # noqa: SIM118 (no mapping)
                view = handle.get_slice(name)
                self.entries[name] = Entry(file, tuple(view.get_shape()), view.get_dtype())

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Reads one tensor in its stored dtype, or the part of it that `index` says."""
        handle = self._open[self.entries[name].file]
        if index is None or all(part == slice(None) for part in index):
            return handle.get_tensor(name)
        return handle.get_slice(name)[index]


def _weight_files(directory: Path) -> list[Path]:
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file():
        return [single]
    if not index.is_file():
        pickled = sorted(p.name for p in directory.glob("*.bin"))
        hint = f" ({pickled[0]} is a pickle, which is not read; convert it)" if pickled else ""
        raise FileNotFoundError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a valid index of safetensors files: {error!r}") from error
    escaping = [name for name in names if Path(name).name != name]
    if escaping:
        raise ValueError(f"{index} names files outside of its directory: {', '.join(escaping)}")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{directory} lacks {len(missing)} of the {len(names)} files in {INDEX_FILE}: "
            f"{', '.join(missing)}"
        )
    return [directory / name for name in names]
