"""What a handler answers with."""

import datetime as dt
import json
import logging
import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any, Self

from worker.custom.package.djl_python.np_util import to_nd_list
from worker.custom.package.djl_python.pair_list import PairList

logger = logging.getLogger("djl_python")


def _as_outputs(texts: Any) -> bytearray:
    """How a piece of a stream is written when the handler does not say otherwise: a JSON line."""
    return bytearray(json.dumps({"outputs": texts}).encode() + b"\n")


class Output:
    """A status code with its message, properties that become headers, and content, or a stream of it."""

    def __init__(self, code: int = 200, message: str = "OK") -> None:
        self.code = code
        self.message = message
        self.properties: dict[str, Any] = {}
        self.content = PairList()
        self.stream_content: Any = None
        self.stream_output_formatter: Callable[[Any], Any] | None = None
        self.finalize_function: Callable[..., Any] | None = None
        self.finalize_args: tuple[Any, ...] | None = None

    def __str__(self) -> str:
        pairs = zip(self.content.keys, self.content.values, strict=True)
        content = {key: f"type: {type(value)}" for key, value in pairs}
        shown = {"code": self.code, "message": self.message, "properties": self.properties}
        return json.dumps(shown | {"content": content}, indent=2)

    def set_code(self, code: int) -> Self:
        self.code = code
        return self

    def set_message(self, message: str) -> Self:
        self.message = message
        return self

    def error(self, error: str, code: int = 424, message: str = "invoke handler failure") -> Self:
        """Make this the answer that something failed: a JSON object says what."""
        self.code, self.message = code, message
        self.add_property("content-type", "application/json")
        self.add_as_json({"code": code, "message": message, "error": error})
        return self

    def add_property(self, key: str, val: Any) -> Self:
        self.properties[key] = val
        return self

    def get_properties(self) -> dict[str, Any]:
        return self.properties

    def get_property(self, key: str) -> Any:
        return self.properties.get(key)

    def add(self, value: Any, key: Any = None, batch_index: int | None = None) -> Self:
        """Add text, bytes, or whatever JSON can say; for one request of a batch with its number."""
        if key is not None and not isinstance(key, str):
            logger.warning("Output key should be str type, got %s", type(key))
            key = str(key)
        if batch_index is not None:
            key = f"batch_{batch_index}.{key or ''}"
        if isinstance(value, str):
            value = value.encode()
        elif not isinstance(value, bytes | bytearray):
            value = self._encode_json(value)
        self.content.add(key=key, value=bytearray(value))
        return self

    def add_as_numpy(self, np_list: Any, key: Any = None, batch_index: int | None = None) -> Self:
        """Add an array or a list of arrays, in DJL's NDList format."""
        return self.add(to_nd_list(np_list), key, batch_index)

    def add_as_npz(self, np_list: Any, key: Any = None, batch_index: int | None = None) -> Self:
        """Add a list of arrays as an .npz file."""
        import io  # noqa: PLC0415

        import numpy as np  # noqa: PLC0415 (only handlers of arrays need it)

        file = io.BytesIO()
        np.savez(file, *np_list)
        return self.add(file.getvalue(), key, batch_index)

    def add_as_json(self, val: Any, key: Any = None, batch_index: int | None = None) -> Self:
        return self.add(self._encode_json(val), key, batch_index)

    def add_as_string(self, val: str, key: Any = None, batch_index: int | None = None) -> Self:
        return self.add(val, key, batch_index)

    def add_stream_content(
        self, stream_content: Any, output_formatter: Callable[[Any], Any] | None = _as_outputs
    ) -> Self:
        """Answer with what an iterator gives, each piece through `output_formatter`, as they come."""
        self.stream_content = stream_content
        self.stream_output_formatter = output_formatter
        return self

    def finalize(self, finalize_function: Callable[..., Any], *args: Any) -> Self:
        """Call this when the answer has been sent."""
        self.finalize_function, self.finalize_args = finalize_function, args
        return self

    def execute_finalize(self) -> Any:
        return self.finalize_function(*(self.finalize_args or ())) if self.finalize_function else None

    @staticmethod
    def _encode_json(val: Any) -> bytearray:
        text = json.dumps(
            val, ensure_ascii=False, allow_nan=False, indent=2, separators=(",", ":"), default=_plain
        )
        return bytearray(text.encode())

    @staticmethod
    def binary_encode(data: Mapping[str, Any]) -> bytearray:
        """Names and values as DJL's rolling batch has them."""
        encoded = bytearray(struct.pack(">h", len(data)))
        for key, value in data.items():
            Output.write_utf8(encoded, key)
            Output.write_utf8(encoded, str(value))
        return encoded

    @staticmethod
    def write_utf8(msg: bytearray, val: str | None) -> None:
        if val is None:
            msg += struct.pack(">i", -1)
            return
        encoded = val.encode()
        msg += struct.pack(">i", len(encoded)) + encoded


def _plain(value: Any) -> Any:
    """What JSON says for a time, and for numpy's numbers and arrays."""
    if isinstance(value, dt.datetime):
        return str(value)
    numpy = sys.modules.get("numpy")  # without it no value is of its types
    if numpy is not None and isinstance(value, numpy.generic | numpy.ndarray):
        return value.tolist()
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")
