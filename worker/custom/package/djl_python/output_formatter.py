"""The mark of an output formatter."""

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def output_formatter(function: F) -> F:
    """Have this function of a `model.py` make of a response's fields what is answered."""
    function.is_output_formatter = True  # type: ignore[attr-defined]
    return function
