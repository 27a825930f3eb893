"""Generation parameters: a JSON object with the names of DJL, TGI and transformers -> SamplingParams."""

from collections.abc import Callable, Mapping
from typing import Any

from worker.errors import InvalidParameters
from worker.jobs import SamplingParams
from worker.wire.checks import nearest, show

MAX_STOP_SEQUENCES = 16
MAX_STOP_CHARACTERS = 256
MAX_NEW_TOKENS = 2**31 - 1
MAX_SEED = 2**64 - 1

# Outside these bounds a float32 logit overflows, and the NaN that follows would reach the sampler.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6
MIN_PENALTY, MAX_PENALTY = 1e-3, 1e3


def read_parameters(given: Mapping[str, object]) -> SamplingParams:
    """Check one row's parameters; null counts as absent. InvalidParameters names the first mistake.

    Without `do_sample` a row is sampled exactly when it has a temperature above 0, a top_k or a top_p
    (TGI's rule), and a temperature of 0 is greedy; with `"do_sample": true` a temperature of 0 is refused.
    """
    said = {name: value for name, value in given.items() if value is not None}
    for name in said:
        if name not in _CHECKS:
            known = nearest(name, _CHECKS)
            raise InvalidParameters(f"parameter {show(name)} is unknown; the nearest known one is {known}")
    values: dict[str, Any] = {name: _CHECKS[name](name, value) for name, value in said.items()}
    values.pop("decoder_input_details", None)
    values["do_sample"] = _do_sample(values)
    if values.get("temperature") == 0:
        del values["temperature"]
    return SamplingParams(**values)


def _do_sample(values: Mapping[str, object]) -> bool:
    temperature = values.get("temperature")
    if "do_sample" not in values:
        return temperature != 0 and not values.keys().isdisjoint({"temperature", "top_k", "top_p"})
    if values["do_sample"] and temperature == 0:
        raise InvalidParameters("parameter temperature is 0; with do_sample true it must be above 0")
    return bool(values["do_sample"])


def _refuse(name: str, value: object, limit: str) -> InvalidParameters:
    return InvalidParameters(f"parameter {name} is {show(value)}; it must be {limit}")


def _boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _refuse(name, value, "true or false")
    return value


def _whole(low: int, high: int) -> Callable[[str, object], int]:
    def check(name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _refuse(name, value, f"a whole number from {low} to {high}")
        return value

    return check


def _number(accepts: Callable[[float], bool], limit: str) -> Callable[[str, object], float]:
    def check(name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not accepts(value):
            raise _refuse(name, value, limit)
        return float(value)

    return check


def _stop_sequences(name: str, value: object) -> tuple[str, ...]:
    limit = f"a list of at most {MAX_STOP_SEQUENCES} texts of 1 to {MAX_STOP_CHARACTERS} characters"
    if not isinstance(value, list) or len(value) > MAX_STOP_SEQUENCES:
        raise _refuse(name, value, limit)
    for index, text in enumerate(value):
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARACTERS:
            raise _refuse(f"{name}[{index}]", text, f"in {limit}")
    return tuple(value)


def _false(name: str, value: object) -> bool:
    if value is not False:
        raise _refuse(name, value, "false: this version does not return the details of the prompt")
    return value


def _is_temperature(value: float) -> bool:
    return value == 0 or MIN_TEMPERATURE <= value <= MAX_TEMPERATURE


_CHECKS: dict[str, Callable[[str, object], object]] = {
    "max_new_tokens": _whole(1, MAX_NEW_TOKENS),
    "do_sample": _boolean,
    "temperature": _number(
        _is_temperature, f"0, or a number from {MIN_TEMPERATURE} to {MAX_TEMPERATURE:.0f}"
    ),
    "top_k": _whole(0, MAX_NEW_TOKENS),
    "top_p": _number(lambda value: 0 < value <= 1, "a number above 0 and at most 1"),
    "repetition_penalty": _number(
        lambda value: MIN_PENALTY <= value <= MAX_PENALTY, f"a number from {MIN_PENALTY} to {MAX_PENALTY:.0f}"
    ),
    "seed": _whole(0, MAX_SEED),
    "stop_sequences": _stop_sequences,
    "ignore_eos": _boolean,
    "details": _boolean,
    "return_full_text": _boolean,
    "decoder_input_details": _false,
}
NAMES = frozenset(_CHECKS)
"""Every parameter that a row may carry."""
