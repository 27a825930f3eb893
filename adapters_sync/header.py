"""The header of a safetensors file, read without loading a weight.

Format: 8 bytes of little-endian header length, a JSON object of that length, then the tensors' bytes. The
checks are those of the safetensors library plus the file's size, so that a truncated upload never passes,
and bounds on what a reader has to take in.
https://github.com/huggingface/safetensors#format
"""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import msgspec

from adapters_sync.errors import InvalidAdapter
from adapters_sync.names import shown

MAX_HEADER_BYTES = 16 << 20
"""Some hundred thousand tensors; the safetensors library's own cap is 100 MB."""
MAX_DIMENSIONS = 8
_DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class TensorInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of the header. Offsets count from the end of the header, in bytes."""

    dtype: str
    shape: Annotated[tuple[_Count, ...], msgspec.Meta(max_length=MAX_DIMENSIONS)]
    data_offsets: tuple[_Count, _Count]

    @property
    def size_bytes(self) -> int:
        """What shape and dtype ask for; the dtype must be a known one."""
        return math.prod(self.shape) * _DTYPE_BYTES[self.dtype]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name, or InvalidAdapter when the file is not whole and sane."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if file_bytes < 8 or length > file_bytes - 8:
            raise InvalidAdapter(
                f"{path.name}: a header of {length} bytes does not fit in a file of {file_bytes} bytes; "
                "the file is truncated or is not safetensors"
            )
        if length > MAX_HEADER_BYTES:
            limit = MAX_HEADER_BYTES
            raise InvalidAdapter(f"{path.name}: the header has {length} bytes; the limit is {limit}")
        tensors = _parse(path.name, file.read(length))
    _check_offsets(path.name, tensors, data_bytes=file_bytes - 8 - length)
    return tensors


def _parse(file_name: str, header: bytes) -> dict[str, TensorInfo]:
    try:
        entries = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        metadata = entries.pop("__metadata__", None)
        if metadata is not None:
            msgspec.json.decode(metadata, type=dict[str, str])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidAdapter(f"{file_name}: the header is not a JSON object of tensors: {error}") from error
    _refuse_doubles(file_name, header)
    return {name: _parse_tensor(file_name, name, raw) for name, raw in entries.items()}


def _refuse_doubles(file_name: str, header: bytes) -> None:
    """Two readers may take different ones of two entries that have one name."""

    def names_once(pairs: list[tuple[str, Any]]) -> None:
        names = set()
        for name, _ in pairs:
            if name in names:
                raise InvalidAdapter(f"{file_name}: the header has the name {shown(name)} twice")
            names.add(name)

    try:
        json.loads(header, object_pairs_hook=names_once)
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter(f"{file_name}: the header is not a JSON object of tensors: {error}") from error


def _parse_tensor(file_name: str, name: str, raw: msgspec.Raw) -> TensorInfo:
    try:
        tensor = msgspec.json.decode(raw, type=TensorInfo)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidAdapter(f"{file_name}: tensor {shown(name)}: {error}") from error
    if tensor.dtype not in _DTYPE_BYTES:
        raise InvalidAdapter(f"{file_name}: tensor {shown(name)} has the unknown dtype {shown(tensor.dtype)}")
    begin, end = tensor.data_offsets
    if end - begin != tensor.size_bytes:
        raise InvalidAdapter(
            f"{file_name}: tensor {shown(name)}, {tensor.dtype} of shape {list(tensor.shape)}, needs "
            f"{tensor.size_bytes} bytes; its data_offsets give it {end - begin}"
        )
    return tensor


def _check_offsets(file_name: str, tensors: dict[str, TensorInfo], data_bytes: int) -> None:
    """The tensors' bytes must follow one another from 0 to the end of the file: no hole, no overlap."""
    spans = sorted(tensor.data_offsets for tensor in tensors.values())
    for (_, end), (begin, _) in pairwise([(0, 0), *spans]):
        if begin != end:
            raise InvalidAdapter(
                f"{file_name}: a tensor begins at offset {begin}, and the one before it ends at {end}"
            )
    last = spans[-1][1] if spans else 0
    if last != data_bytes:
        raise InvalidAdapter(
            f"{file_name}: the header describes {last} bytes of tensors and the file holds {data_bytes}; "
            "the upload is truncated or damaged"
        )
