"""Initializers whose bytes are not where onnx keeps them: left out, mapped from a file, or of types numpy lacks."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx

FOUR_BIT = ("int4", "uint4", "float4_e2m1fn")
FILES = 10_240  # open at a time, where the system names no limit
Array = np.ndarray[Any, Any]


@cache
def open_many_files() -> None:
    """Let this process have as many files open as it may at all: a mapping keeps its file open, and large models have
    more tensors than the 1024 files that are usual."""
    with suppress(ImportError, OSError, ValueError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = FILES if hard == resource.RLIM_INFINITY else hard
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def placeholder(name: str, values: Array) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, dims=values.shape, data_location=onnx.TensorProto.EXTERNAL)
    tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "unset"
    return tensor


def of_foreign_types(proto: onnx.ModelProto) -> dict[str, Array]:
    """Constants inside the file whose types numpy does not have (float8, bfloat16, 4 bits): graphsurgeon reads them as
    float32, and writes that."""
    return {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in proto.graph.initializer
        if tensor.data_location != onnx.TensorProto.EXTERNAL
        and onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).isbuiltin != 1
    }


def map_external(tensor: onnx.TensorProto, folder: Path) -> Array:
    entries = {e.key: e.value for e in tensor.external_data}
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    if dtype.name in FOUR_BIT:  # two to a byte in the file, one in an array
        unpacked: Array = onnx.numpy_helper.to_array(tensor, str(folder))
        return unpacked
    open_many_files()
    return np.memmap(
        folder / entries["location"],
        dtype=dtype,
        mode="r",
        offset=int(entries.get("offset", 0)),
        shape=tuple(tensor.dims),
    )
