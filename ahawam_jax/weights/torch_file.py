"""Files of torch.save: a zip archive with a pickle that names the tensors and one uncompressed member for each.

Reading never executes pickled code: the few constructors that tensors need are replaced by ours, everything else in
the pickle is refused by name. Neither direction needs torch, and tensors are read and written one at a time.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ahawam_jax.weights.tensors import DTYPES, Tensor, WeightsError
from data_pipelines.disk import whole_file
from data_pipelines.files import disguised

STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip
ZIP = b"PK\x03\x04"  # how an archive begins
ALIGNMENT = 64  # of the tensors in the file, so that torch can map them


# ----------------------------------------------------------------------------------------------------- reading
def read_torch(path: Path) -> Any:
    """What torch.save was given: dicts and lists whose tensors are `Tensor`s, unread.

    Raises WeightsError for a file that is cut off, in the format before torch 1.6, or whose pickle asks for code.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _Unpickler(path, archive).load()
    except zipfile.BadZipFile as error:
        raise WeightsError(f"{path} {_no_archive(path, error)}.") from error
    except (pickle.UnpicklingError, KeyError, EOFError, TypeError, IndexError, AttributeError) as error:
        raise WeightsError(f"{path} has no readable table of tensors ({error}); copy it again.") from error


def _no_archive(path: Path, error: zipfile.BadZipFile) -> str:
    if found := disguised(path, own=ZIP):
        return found
    with path.open("rb") as file:
        kind = file.read(2)
    if kind == b"PK":
        return f"is cut off ({error}); copy it again"
    if kind[:1] == b"\x80":
        return "is a plain pickle, not a zip file of torch.save; one older than torch 1.6 must be saved again by torch"
    return "is not a zip file of torch.save; give a .pt or .safetensors file of weights"


@dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    offset: int  # bytes from the beginning of the file
    size: int  # bytes


class _Unpickler(pickle.Unpickler):
    def __init__(self, path: Path, archive: zipfile.ZipFile):
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise WeightsError(f"{path} is a zip file, but not one of torch.save: it holds no single data.pkl.")
        super().__init__(io.BytesIO(archive.read(names[0])))
        self.path, self.archive, self.folder = path, archive, names[0].removesuffix("data.pkl")
        order = self.folder + "byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise WeightsError(f"{path} was written on a big-endian machine; save it again on a little-endian one.")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in STORAGES:
            return DTYPES[STORAGES[name]]
        if module == "torch" and name in DTYPES:
            return f"torch.{name}"
        raise WeightsError(
            f"{self.path} holds a pickled {module}.{name}, and reading it would run its code. Only tensors, numbers, "
            "strings, lists and dicts are read: save the state_dict alone, in torch, and use that file."
        )

    def persistent_load(self, key: Any) -> _Storage:
        _, dtype, number, _, count = key
        info = self.archive.getinfo(f"{self.folder}data/{number}")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size < count * dtype.itemsize:
            raise WeightsError(f"{self.path} has a damaged or compressed tensor (data/{number}); save it again.")
        with self.path.open("rb") as file:  # the local header's extra field may differ from the directory's
            file.seek(info.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
        return _Storage(dtype, info.header_offset + 30 + name + extra, info.file_size)

    def _tensor(self, storage: _Storage, start: int, shape: tuple, strides: tuple, *_: Any) -> Tensor:
        size = storage.dtype.itemsize
        last = start + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if 0 not in shape and not 0 <= start <= last < storage.size // size:
            raise WeightsError(f"{self.path} has a tensor {list(shape)} that reaches beyond its data; copy it again.")
        steps = tuple(step * size for step in strides)
        return Tensor(self.path, tuple(shape), storage.dtype, storage.offset + start * size, steps)


# ----------------------------------------------------------------------------------------------------- writing
def write_torch(path: Path, tree: Mapping[str, Any]) -> None:
    """Writes nested dicts with str, int and array leaves (anything with shape, dtype and __array__), in their order.

    torch.load(path, weights_only=True) returns the same dicts with tensors. Arrays are asked for one at a time; the
    file appears whole or not at all.
    """
    leaves = list(_arrays(tree))
    folder = path.stem
    with whole_file(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        numbers = {id(x): i for i, x in enumerate(leaves)}
        archive.writestr(f"{folder}/data.pkl", b"\x80\x02" + b"".join(_pickle(tree, numbers)) + b".")
        archive.writestr(f"{folder}/byteorder", b"little")
        for i, x in enumerate(leaves):
            info = zipfile.ZipInfo(f"{folder}/data/{i}")
            info.file_size = int(np.prod(x.shape, dtype=np.int64)) * x.dtype.itemsize
            # An extra field as padding; the zip64 field that zipfile adds for large members takes 20 bytes more.
            wide = 20 if info.file_size * 1.05 > zipfile.ZIP64_LIMIT else 0
            begin = archive.fp.tell() + 30 + len(info.filename) + wide + 4
            info.extra = struct.pack("<2sH", b"FB", -begin % ALIGNMENT) + b"Z" * (-begin % ALIGNMENT)
            with archive.open(info, "w") as member:
                member.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
        archive.writestr(f"{folder}/version", b"3\n")


def _arrays(tree: Any) -> Iterator[Any]:
    if isinstance(tree, Mapping):
        for value in tree.values():
            yield from _arrays(value)
    elif not isinstance(tree, (str, int)):
        yield tree


def _pickle(value: Any, numbers: Mapping[int, int]) -> Iterator[bytes]:
    """Opcodes of pickle protocol 2: what pickle would write, without importing the classes it names."""
    if isinstance(value, Mapping):
        yield b"}("
        for key, item in value.items():
            yield from _pickle(key, numbers)
            yield from _pickle(item, numbers)
        yield b"u"
    elif isinstance(value, str):
        text = value.encode()
        yield b"X" + struct.pack("<I", len(text)) + text
    elif isinstance(value, int):
        raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        yield b"\x8a" + bytes([len(raw)]) + raw
    else:
        storage = next(name for name, dtype in STORAGES.items() if DTYPES[dtype] == value.dtype)
        strides = np.cumprod((1, *value.shape[:0:-1]), dtype=np.int64)[::-1].tolist() if value.shape else []
        yield b"ctorch._utils\n_rebuild_tensor_v2\n(("
        yield from _pickle("storage", numbers)
        yield f"ctorch\n{storage}\n".encode()
        for item in (str(numbers[id(value)]), "cpu", int(np.prod(value.shape, dtype=np.int64))):
            yield from _pickle(item, numbers)
        yield b"tQ"
        yield from _pickle(0, numbers)
        for sizes in (value.shape, strides):
            yield b"("
            for size in sizes:
                yield from _pickle(int(size), numbers)
            yield b"t"
        yield b"\x89ccollections\nOrderedDict\n)RtR"
