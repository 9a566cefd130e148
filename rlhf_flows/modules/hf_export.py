"""Weights that come one by one, written as a Hugging Face folder.

The decision here: a model may be larger than what there is to spare, so files are written as they
fill, and what is held is one file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["MAX_FILE_BYTES", "copy_description", "write_weights"]

MAX_FILE_BYTES = 5_000_000_000
"""Of one file of weights, as Hugging Face cuts them."""

_WEIGHTS = ("*.safetensors*", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf", "*.h5", ".*")


def write_weights(
    weights: Iterable[tuple[str, Tensor]], folder: Path, *, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """`model.safetensors`, or several files and their index where there are more bytes. A tensor
    is looked at until the next one comes, and copied.
    """
    files: list[Path] = []
    places: dict[str, int] = {}
    held: dict[str, Tensor] = {}
    held_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal held, held_bytes
        files.append(folder / f"part-{len(files) + 1:05d}.safetensors")
        save_file(held, files[-1], metadata={"format": "pt"})
        held, held_bytes = {}, 0

    for name, tensor in weights:
        if held and held_bytes + tensor.nbytes > max_file_bytes:
            flush()
        held[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        places[name] = len(files)
        held_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    flush()
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
        return
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    for file, own in zip(files, names, strict=True):
        file.rename(folder / own)
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": {name: names[place] for name, place in places.items()},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), "utf-8")


def copy_description(source: Path, folder: Path, *, dtype: str) -> None:
    """The files of a Hugging Face folder but its weights: configurations and tokenizer. `dtype` is
    that of the weights to come, such as `bfloat16`.
    """
    for described in source.iterdir():
        if described.is_file() and not any(described.match(pattern) for pattern in _WEIGHTS):
            shutil.copy(described, folder)
    file = folder / "config.json"
    config = json.loads(file.read_text("utf-8"))
    config.pop("torch_dtype", None)
    file.write_text(json.dumps({**config, "dtype": dtype}, indent=2) + "\n", "utf-8")
