"""Video transformers of true size with random bfloat16 weights, as the sharded folders that diffusers writes.

All weights are windows of one block of random numbers, each tensor's at a place of its own, so that 28 GB take as long
as writing them. Norms' gains are around 1.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import ml_dtypes
import numpy as np
import torch

SCALE = 0.02  # standard deviation of weights
BLOCK = 1 << 26  # numbers
SHARD_BYTES = 5_000_000_000
STEM = "diffusion_pytorch_model"
WAN = "WanTransformer3DModel"
Array = np.ndarray[Any, Any]


def write(folder: Path, settings: Mapping[str, Any], class_name: str = WAN) -> int:
    """Bytes of the weights of diffusers' class of this name in `folder`; written unless they are there already."""
    shapes = _shapes(settings, class_name)
    config, done = {"_class_name": class_name, **settings}, folder / "done.json"
    if not done.is_file() or json.loads(done.read_text()) != config:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _write(folder, config, shapes)
        done.write_text(json.dumps(config))
    return sum(2 * int(np.prod(shape)) for shape in shapes.values())


def _shapes(settings: Mapping[str, Any], class_name: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        network = getattr(diffusers, class_name)(**settings)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _write(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    random = np.random.default_rng(0)
    small = random.standard_normal(BLOCK, np.float32)
    small *= SCALE
    weights = small.astype(ml_dtypes.bfloat16)
    gains = (1 + small[: 1 << 16]).astype(ml_dtypes.bfloat16)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = SHARD_BYTES
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        if size > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = shape
        room -= size
    index = {}
    for number, shard in enumerate(shards):
        file = f"{STEM}-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        index |= dict.fromkeys(shard, file)
        with (folder / file).open("wb") as stream:
            stream.write(_header(shard))
            for name, shape in shard.items():
                source = gains if "norm" in name and name.endswith("weight") and len(shard[name]) == 1 else weights
                for piece in _pieces(name, int(np.prod(shape)), source):
                    stream.write(piece)
    total = sum(2 * int(np.prod(shape)) for shape in shapes.values())
    (folder / f"{STEM}.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    (folder / "config.json").write_text(json.dumps(dict(config)))


def _header(shard: Mapping[str, tuple[int, ...]]) -> bytes:
    entries, place = {}, 0
    for name, shape in shard.items():
        end = place + 2 * int(np.prod(shape))
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(name: str, count: int, source: Array) -> list[memoryview]:
    """`count` numbers of `source`, from a place that the name decides, around its end."""
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little") % len(source)
    found = []
    while count:
        piece = source[start : start + count]
        found.append(memoryview(piece.view(np.uint16)).cast("B"))
        count -= len(piece)
        start = 0
    return found
