"""A request as its content type says, and an answer in the type that is asked for."""

import csv
import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from worker.custom.package.djl_python.inputs import Input
from worker.custom.package.djl_python.outputs import Output

_COLUMNS = ("question", "context", "inputs")


def decode(
    inputs: Input, content_type: str | None, key: str | None = None, require_csv_headers: bool = True
) -> Any:
    """The body; what is not JSON comes as `{"inputs": ...}`."""
    kind = content_type or ""
    if "application/json" in kind or not kind:
        return inputs.get_as_json(key) if kind or inputs.get_as_bytes(key) else {"inputs": ""}
    if "text/csv" in kind:
        return decode_csv(inputs, require_csv_headers)
    if "text/plain" in kind:
        return {"inputs": [inputs.get_as_string(key)]}
    return {"inputs": _reader(inputs, kind)(key)}


def _reader(inputs: Input, kind: str) -> Callable[[str | None], Any]:
    if kind.startswith("image/"):
        return inputs.get_as_image
    if "tensor/npz" in kind:
        return inputs.get_as_npz
    if kind in {"tensor/ndlist", "application/x-npy"}:
        return inputs.get_as_numpy
    return inputs.get_as_string if kind == "application/x-www-form-urlencoded" else inputs.get_as_bytes


def encode(outputs: Output, prediction: Any, content_type: str | None, key: str | None = None) -> None:
    """Put a prediction into `outputs`, with the type it then has; by default as arrays."""
    kind = content_type or "application/json"
    if "application/json" in kind:
        outputs.add_as_json(prediction, key).add_property("Content-Type", "application/json")
    elif "text/csv" in kind:
        outputs.add_as_string(encode_csv(prediction), key).add_property("Content-Type", "text/csv")
    elif "tensor/npz" in kind:
        outputs.add_as_npz(prediction, key).add_property("Content-Type", "tensor/npz")
    else:
        outputs.add_as_numpy(prediction, key).add_property("Content-Type", "tensor/ndlist")


def decode_csv(inputs: Input, require_headers: bool = True) -> Any:
    """Rows by the names of their columns; numbers alone, as an array, where no names are required."""
    text = inputs.get_as_string()
    if not require_headers:
        import numpy as np  # noqa: PLC0415 (only handlers of arrays need it)

        numbers = np.genfromtxt(io.StringIO(text), delimiter=",")
        if np.isnan(numbers).any():
            raise ValueError("the CSV has something that is no number")
        return numbers
    head = text.splitlines()[0].lower() if text else ""
    if not any(name in head for name in _COLUMNS):
        raise ValueError(f"the CSV's first line must name one of the columns {', '.join(_COLUMNS)}")
    rows = list(csv.DictReader(io.StringIO(text)))
    if rows and "inputs" in rows[0]:
        return {"inputs": [row["inputs"] for row in rows]}
    return {"inputs": rows}


def encode_csv(content: Iterable[Mapping[str, Any]]) -> str:
    """Rows with a line of their names before them."""
    rows = list(content)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
