"""What a handler is called with."""

import csv
import io
import json
from typing import Any

from worker.custom.package.djl_python.np_util import from_nd_list
from worker.custom.package.djl_python.pair_list import PairList

_PREFIX = "batch_"
_DIGITS = 3


class Input:
    """Properties (the headers of a request, texts by name) and content (its parameters and its body, bytes).

    Of a batch, every name begins with the number of its request: `batch_001.data`.
    """

    def __init__(self) -> None:
        self.function_name: str | None = None
        self.properties: dict[str, Any] = {}
        self.content = PairList()

    def __str__(self) -> str:
        lines = [f"properties: {self.properties}"]
        lines += [f"{key}: {self.get_data(key)}" for key in self.content.keys]
        return "\n".join(lines)

    def is_batch(self) -> bool:
        return "batch_size" in self.properties

    def get_batch_size(self) -> int:
        return int(self.properties.get("batch_size", "1"))

    def get_batches(self) -> list["Input"]:
        """One Input for each request of a batch; itself, when it is none."""
        if not self.is_batch():
            return [self]
        batch = [Input() for _ in range(self.get_batch_size())]
        for name, value in self.properties.items():
            if name.startswith(_PREFIX) and name != "batch_size":
                index, key = _numbered(name)
                batch[index].properties[key] = value
        for name, value in zip(self.content.keys, self.content.values, strict=True):
            index, key = _numbered(name)
            batch[index].content.add(key, value)
        return batch

    def get_function_name(self) -> str | None:
        return self.function_name

    def get_properties(self) -> dict[str, Any]:
        return self.properties

    def get_content(self) -> PairList:
        return self.content

    def get_property(self, key: str) -> Any:
        """A property by its name in any case; None when it is not there."""
        return next((value for name, value in self.properties.items() if name.lower() == key.lower()), None)

    def contains_key(self, key: str) -> bool:
        return self.content.get(key) is not None

    def get_data(self, key: str | None = None) -> Any:
        """The content as its content type says; None when there is none."""
        kind = self.get_property("content-type") or ""
        if kind == "tensor/ndlist":
            return self.get_as_numpy(key)
        if kind == "tensor/npz":
            return self.get_as_npz(key)
        if kind.startswith("application/json"):
            return self.get_as_json(key)
        if kind.startswith("text/"):
            return self.get_as_string(key)
        if kind.startswith("image/"):
            return self.get_as_image(key)
        return None if self.content.is_empty() else self.get_as_bytes(key)

    def get_as_bytes(self, key: str | None = None) -> Any:
        """The value of `key`, by default of `data`, else the first; None when there is no content at all.

        Raises KeyError when `key` is not there.
        """
        if self.content.is_empty():
            return None
        value = self.content.get(key or "data")
        if value is None and key:
            raise KeyError(f"requested data for key:{key} is not found!")
        return self.content.value_at(0) if value is None else value

    def get_as_string(self, key: str | None = None) -> str:
        return str(self.get_as_bytes(key).decode("utf-8"))

    def get_as_json(self, key: str | None = None) -> Any:
        return json.loads(self.get_as_string(key))

    def get_as_image(self, key: str | None = None) -> Any:
        from PIL import Image  # noqa: PLC0415 (only handlers of images need it)

        return Image.open(io.BytesIO(self.get_as_bytes(key)))

    def get_as_numpy(self, key: str | None = None) -> list[Any]:
        """Arrays in DJL's NDList format, or those of an .npz or .npy file."""
        return from_nd_list(self.get_as_bytes(key))

    def get_as_npz(self, key: str | None = None) -> list[Any]:
        """The arrays of an .npz file."""
        return from_nd_list(self.get_as_bytes(key))

    def get_as_csv(self, key: str | None = None) -> list[dict[str, Any]]:
        return list(csv.DictReader(io.StringIO(self.get_as_string(key))))

    def is_empty(self) -> bool:
        """Whether there is no content, as in the first call, which is for initialisation."""
        return self.content.is_empty()


def _numbered(name: str) -> tuple[int, str]:
    """The number and the name in `batch_001.name`."""
    end = len(_PREFIX) + _DIGITS
    return int(name[len(_PREFIX) : end]), name[end + 1 :]
