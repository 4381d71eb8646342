"""Files of tensors that others wrote, read without running code from them."""

import io
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}


def read_safetensors(content: bytes, source: str) -> dict[str, np.ndarray]:
    """Read the arrays of a safetensors file.

    **Raises** ValueError if it is none.
    """
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__", None)
        data = content[8 + length :]
        arrays = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            array = np.frombuffer(data[begin:end], _TYPES[entry["dtype"]])
            if entry["dtype"] == "BF16":  # the upper half of a float32
                array = (array.astype("<u4") << 16).view("<f4")
            arrays[name] = array.reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"Expected a safetensors file of the types {', '.join(_TYPES)}. Received: {source}, "
            f"which cannot be read as one ({type(error).__name__}: {error})"
        ) from error
    return arrays


def read_torch(content: bytes, source: str, allowed: Sequence[type] = ()) -> Any:
    """Read a file that `torch.save` wrote, of plain containers of tensors.

    Nothing in the file is run: it is loaded with `weights_only=True`.

    **Args**
        content: The file.
        source: What errors call it.
        allowed: Classes that may be in it beside tensors.

    **Raises** ImportError without PyTorch; ValueError for a file with anything else in it.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"Reading {source} needs PyTorch (`pip install torch`), under any Keras backend. "
            "A safetensors file can be read without it."
        ) from error
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(
            "Expected a PyTorch file of plain tensors; one with other objects could run code when "
            "it is loaded, so it is not. Save `model.state_dict()` alone, or use safetensors. "
            f"Received: {source} ({str(error).splitlines()[0] if str(error) else error!r})"
        ) from error


def as_arrays(tensors: Any, source: str) -> dict[str, np.ndarray]:
    """The NumPy arrays of a state dict of PyTorch tensors.

    **Raises** ValueError if it is something else.
    """
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and hasattr(value, "is_floating_point")
        for name, value in tensors.items()
    ):
        received = sorted(map(str, tensors)) if isinstance(tensors, dict) else type(tensors)
        raise ValueError(
            f"Expected a state dict, tensors by name. Received: {source} with {received}"
        )
    return {
        name: (value.detach().float() if value.is_floating_point() else value).numpy()
        for name, value in tensors.items()
    }


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read a file of named tensors, safetensors by its suffix or else PyTorch's."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        return read_safetensors(content, str(path))
    return as_arrays(read_torch(content, str(path)), str(path))


def read_sharded_tensors(index: Path) -> dict[str, np.ndarray]:
    """Read the files that an index (`*.index.json`) names, which lie beside it.

    **Raises** OSError if one of them is missing; ValueError for an index that is none, that names a
    file elsewhere, or that does not name the tensors that the files hold.
    """
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(files.values()))
        inside = all(Path(shard).name == shard for shard in shards)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"Expected an index with a `weight_map`. Received: {index}") from error
    if not inside:
        raise ValueError(f"Expected files beside the index. Received: {shards} in {index}")
    tensors: dict[str, np.ndarray] = {}
    for shard in shards:
        tensors |= read_tensors(index.parent / shard)
    if differ := sorted(set(files) ^ set(tensors)):
        raise ValueError(
            f"Expected the tensors that {index} names. Received: files that differ from it in "
            f"{', '.join(differ)}"
        )
    return tensors
