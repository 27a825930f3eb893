"""The mark of an input formatter."""

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def input_formatter(function: F) -> F:
    """Have this function of a `model.py` make of a request's payload what the model is asked."""
    function.is_input_formatter = True  # type: ignore[attr-defined]
    return function
