"""Tensors computed once, kept in files named after everything that determines them, with a hash of their content."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from etherdiff.system.files import digest, save_tensors
from etherdiff.system.paths import cache_dir

Tensors = dict[str, Tensor]


def cached(kind: str, key: dict[str, Any], compute: Callable[[], Tensors]) -> Tensors:
    """The tensors of `compute()`, from the cache if they are there whole and were made from the same key."""
    path = cache_dir() / kind / f"{digest(key)}.safetensors"
    found = _read(path, key)
    if found is not None:
        return found
    tensors = {name: tensor.contiguous() for name, tensor in compute().items()}  # as they will be read back
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, path, {"key": json.dumps(key), "sha256": content_hash(tensors)})
    return tensors


def content_hash(tensors: Tensors) -> str:
    """SHA-256 of names, types, shapes and values."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _read(path: Path, key: dict[str, Any]) -> Tensors | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            made = file.metadata() or {}
            if json.loads(made.get("key", "null")) != json.loads(json.dumps(key)):
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        return tensors if content_hash(tensors) == made.get("sha256") else None
    except (SafetensorError, OSError, ValueError):
        return None  # a damaged file is as good as none
