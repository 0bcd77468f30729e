"""safetensors files: eight bytes of header length, a JSON header, the tensors. Read and written one at a time.

The `safetensors` library maps or holds a whole file; here only the tensor in hand is in memory.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ahawam_jax.weights.tensors import DTYPES, Tensor, WeightsError
from data_pipelines.disk import whole_file
from data_pipelines.files import disguised

NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
LARGEST_HEADER = 100 * 2**20  # the format's own limit


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file, unread, and its metadata. Raises WeightsError if it is not whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > LARGEST_HEADER:
            found = disguised(path) or "is not a safetensors file; give a .safetensors or .pt file, or its folder"
            raise WeightsError(f"{path} {found}.")
        raw = file.read(length)
    if len(raw) < length:
        raise WeightsError(f"{path} is cut off inside its header, after {size:,} bytes; copy it again.")
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", {})
        entries = {
            name: (row["dtype"], tuple(row["shape"]), *map(int, row["data_offsets"])) for name, row in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        found = disguised(path, own=b"{") or f"has no readable safetensors header ({error!r}); copy it again"
        raise WeightsError(f"{path} {found}.") from error
    end = 8 + length + max((stop for *_, stop in entries.values()), default=0)
    if size < end:
        raise WeightsError(f"{path} is cut off: it has {size:,} bytes of {end:,}; copy it again.")
    tensors = {}
    for name, (kind, shape, start, stop) in entries.items():
        if kind not in NAMES:
            raise WeightsError(
                f"{path} stores {name} as {kind}, which is not read; use the bfloat16 or float32 file of this model."
            )
        tensors[name] = Tensor(path, shape, DTYPES[NAMES[kind]], 8 + length + start)
        if tensors[name].nbytes != stop - start:
            raise WeightsError(
                f"{path} gives {name} {stop - start:,} bytes, {list(shape)} of {kind} needs {tensors[name].nbytes:,}; "
                "the file is damaged, copy it again."
            )
    return tensors, metadata


def write_safetensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Writes arrays, or anything with shape, dtype and __array__, one at a time; whole or not at all."""
    codes = {DTYPES[name]: code for code, name in NAMES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, x in tensors.items():
        size = int(np.prod(x.shape, dtype=np.int64)) * x.dtype.itemsize
        header[name] = {"dtype": codes[x.dtype], "shape": list(x.shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with whole_file(path) as partial, partial.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for x in tensors.values():
            file.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
