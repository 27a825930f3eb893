"""Arrays as bytes: DJL's NDList format, and numpy's own files.

NDList, big-endian: the number of arrays; then for each the text "NDAR", version 3, whether it has a name
and the name, the text "default", its type in capitals, its shape (how many dimensions, each as 8 bytes, and
again how many, with a letter of two bytes each), "<" for the byte order of the data, their length, the data.
A text is its length in 2 bytes and its bytes.
"""

import io
import math
import struct
from typing import Any

MAGIC_NUMBER = "NDAR"
VERSION = 3
_NPY, _ZIP = b"\x93NUMPY", b"PK"
_KINDS = "biufc"


def from_nd_list(encoded: bytes | bytearray) -> list[Any]:
    """The arrays in an NDList, an .npz or an .npy file. Raises ValueError for anything else.

    Nothing in a file is unpickled.
    """
    import numpy as np  # noqa: PLC0415 (only handlers of arrays need it)

    encoded = bytes(encoded)
    if encoded.startswith(_ZIP):
        with np.load(io.BytesIO(encoded), allow_pickle=False) as file:
            return [file[name] for name in file.files]
    if encoded.startswith(_NPY):
        return [np.load(io.BytesIO(encoded), allow_pickle=False)]
    reader = _Reader(encoded)
    return [_array(reader) for _ in range(reader.number(">i"))]


def to_nd_list(np_list: Any) -> bytearray:
    """An array, or a list of them, as an NDList."""
    import numpy as np  # noqa: PLC0415 (only handlers of arrays need it)

    arrays = np_list if isinstance(np_list, list) else [np_list]
    encoded = bytearray(struct.pack(">i", len(arrays)))
    for given in arrays:
        array = np.asarray(given)
        dimensions = len(array.shape)
        data = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False)).tobytes()
        encoded += _text(MAGIC_NUMBER) + struct.pack(">iB", VERSION, 0) + _text("default")
        encoded += _text(array.dtype.newbyteorder("=").name.upper())
        encoded += struct.pack(f">i{dimensions}q", dimensions, *array.shape)
        encoded += struct.pack(f">i{dimensions}h", dimensions, *[ord("?")] * dimensions)
        encoded += b"<" + struct.pack(">i", len(data)) + data
    return encoded


def _array(reader: "_Reader") -> Any:
    import numpy as np  # noqa: PLC0415

    magic, version = reader.text(), reader.number(">i")
    if (magic, version) != (MAGIC_NUMBER, VERSION):
        raise ValueError(f"an array begins with {magic!r} {version}; it must be {MAGIC_NUMBER!r} {VERSION}")
    if reader.number(">B"):
        reader.text()  # its name
    reader.text()  # how sparse it is: only "default" is written
    dtype = np.dtype(reader.text().lower())
    if dtype.kind not in _KINDS:
        raise ValueError(f"an array has the type {dtype}; it must be one of numbers")
    shape = tuple(reader.number(">q") for _ in range(reader.number(">i")))
    for _ in range(reader.number(">i")):
        reader.number(">h")  # the letters of its layout
    order, data = chr(reader.number(">B")), reader.take(reader.number(">i"))
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"an array has the shape {shape} and {len(data)} bytes of {dtype}")
    return np.ndarray(shape, dtype.newbyteorder(">" if order == ">" else "<"), bytearray(data))  # writable


def _text(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack(">h", len(encoded)) + encoded


class _Reader:
    """Reads on from where it is. Raises ValueError at the end."""

    def __init__(self, encoded: bytes) -> None:
        self._left = memoryview(encoded)

    def take(self, count: int) -> bytes:
        if not 0 <= count <= len(self._left):
            raise ValueError("the bytes are no NDList, and no .npz or .npy file")
        taken, self._left = self._left[:count], self._left[count:]
        return bytes(taken)

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def text(self) -> str:
        return self.take(self.number(">h")).decode()
