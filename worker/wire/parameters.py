"""Generation parameters: a JSON object with the names of DJL, TGI and transformers -> SamplingParams.

What these lack has vLLM's or OpenAI's name. `worker.engine.logit_changes` and `worker.engine.draws` say what
each does, and in which order.
"""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from worker.errors import InvalidParameters
from worker.jobs import MAX_TOP_N_TOKENS, SamplingParams
from worker.wire.checks import nearest, show

MAX_STOP_SEQUENCES = 16
MAX_STOP_CHARACTERS = 256
MAX_NEW_TOKENS = 2**31 - 1
MAX_SEED = 2**64 - 1
MAX_TOKEN_IDS = 1024
MAX_TOKEN_ID = 2**31 - 1
MAX_OPENAI_PENALTY, MAX_LOGIT_BIAS = 2, 100

# Outside these bounds a float32 logit overflows, and the NaN that follows would reach the sampler.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6
MIN_PENALTY, MAX_PENALTY = 1e-3, 1e3


def read_parameters(given: Mapping[str, object]) -> SamplingParams:
    """Check one row's parameters; null counts as absent. InvalidParameters names the first mistake.

    Without `do_sample` a row is sampled exactly when it has a temperature above 0, a top_k, a top_p, a
    typical_p (TGI's rule) or a min_p, and a temperature of 0 is greedy; with `"do_sample": true` a
    temperature of 0 is refused. `decoder_input_details` brings `details` with it whatever that says (TGI's
    rule again), and so does `top_n_tokens`.
    """
    said = {_SPELLINGS.get(name, name): value for name, value in given.items() if value is not None}
    for name in said:
        if name not in _CHECKS:
            known = nearest(name, _CHECKS)
            raise InvalidParameters(f"parameter {show(name)} is unknown; the nearest known one is {known}")
    values: dict[str, Any] = {name: _CHECKS[name](name, value) for name, value in said.items()}
    values["prompt_log_probs"] = values.pop("decoder_input_details", False)
    if values["prompt_log_probs"] or values.get("top_n_tokens"):
        values["details"] = True
    values["do_sample"] = _do_sample(values)
    if values.get("temperature") == 0:
        del values["temperature"]
    params = SamplingParams(**values)
    if params.min_new_tokens > params.max_new_tokens:
        raise refuse(
            "min_new_tokens", params.min_new_tokens, f"at most max_new_tokens, {params.max_new_tokens}"
        )
    return params


def read_score_parameters(given: Mapping[str, object]) -> SamplingParams:
    """Check the parameters of a row that is scored: of the names above, `details` alone means something."""
    said = {name: value for name, value in given.items() if value is not None}
    for name in said:
        if name in _CHECKS and name != "details":
            raise InvalidParameters(
                f"parameter {name} is for rows that generate; one that is scored takes details"
            )
    return msgspec.structs.replace(read_parameters(said), max_new_tokens=0)


_DRAWN_BY = frozenset({"temperature", "top_k", "top_p", "min_p", "typical_p"})


def _do_sample(values: Mapping[str, object]) -> bool:
    temperature = values.get("temperature")
    if "do_sample" not in values:
        return temperature != 0 and not values.keys().isdisjoint(_DRAWN_BY)
    if values["do_sample"] and temperature == 0:
        raise InvalidParameters("parameter temperature is 0; with do_sample true it must be above 0")
    return bool(values["do_sample"])


def check(name: str, value: object, said_as: str) -> Any:
    """The value of parameter `name` in a row where it is called `said_as`. Raises InvalidParameters."""
    return _CHECKS[name](said_as, value)


def refuse(name: str, value: object, limit: str) -> InvalidParameters:
    """What to raise for a parameter beyond its limit."""
    return InvalidParameters(f"parameter {name} is {show(value)}; it must be {limit}")


def _boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise refuse(name, value, "true or false")
    return value


def _whole(low: int, high: int) -> Callable[[str, object], int]:
    def check(name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise refuse(name, value, f"a whole number from {low} to {high}")
        return value

    return check


def _number(accepts: Callable[[float], bool], limit: str) -> Callable[[str, object], float]:
    def check(name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not accepts(value):
            raise refuse(name, value, limit)
        return float(value)

    return check


def _stop_sequences(name: str, value: object) -> tuple[str, ...]:
    limit = f"a list of at most {MAX_STOP_SEQUENCES} texts of 1 to {MAX_STOP_CHARACTERS} characters"
    if not isinstance(value, list) or len(value) > MAX_STOP_SEQUENCES:
        raise refuse(name, value, limit)
    for index, text in enumerate(value):
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARACTERS:
            raise refuse(f"{name}[{index}]", text, f"in {limit}")
    return tuple(value)


def _token_ids(least: int) -> Callable[[str, object], tuple[int, ...]]:
    def check(name: str, value: object) -> tuple[int, ...]:
        if not isinstance(value, list) or not least <= len(value) <= MAX_TOKEN_IDS:
            raise refuse(name, value, f"a list of {least} to {MAX_TOKEN_IDS} token ids")
        return tuple(dict.fromkeys(_token_id(f"{name}[{index}]", token) for index, token in enumerate(value)))

    return check


def _logit_bias(name: str, value: object) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict) or len(value) > MAX_TOKEN_IDS:
        raise refuse(name, value, f"an object of at most {MAX_TOKEN_IDS} token ids and their biases")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        digits = key.isascii() and key.isdecimal() and len(key) <= len(str(MAX_TOKEN_ID))
        token = _token_id(f"{name}'s key", int(key) if digits else key)
        if token in biases:
            raise refuse(f"{name}'s key", key, "there once")
        biases[token] = _bias(f"{name}[{key}]", bias)
    return tuple(biases.items())


def _is_temperature(value: float) -> bool:
    return value == 0 or MIN_TEMPERATURE <= value <= MAX_TEMPERATURE


def _between(low: float, high: float) -> Callable[[str, object], float]:
    return _number(lambda value: low <= value <= high, f"a number from {low} to {high}")


_top_k = _whole(-1, MAX_NEW_TOKENS)
"""Of which -1 is off, too: vLLM's way to say it."""
_token_id = _whole(0, MAX_TOKEN_ID)
_share = _number(lambda value: 0 < value <= 1, "a number above 0 and at most 1")
_penalty = _between(-MAX_OPENAI_PENALTY, MAX_OPENAI_PENALTY)
_bias = _between(-MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)

_CHECKS: dict[str, Callable[[str, object], object]] = {
    "max_new_tokens": _whole(1, MAX_NEW_TOKENS),
    "min_new_tokens": _whole(0, MAX_NEW_TOKENS),
    "do_sample": _boolean,
    "temperature": _number(
        _is_temperature, f"0, or a number from {MIN_TEMPERATURE} to {MAX_TEMPERATURE:.0f}"
    ),
    "top_k": lambda name, value: max(0, _top_k(name, value)),
    "top_p": _share,
    "min_p": _between(0, 1),
    "typical_p": _share,
    "repetition_penalty": _number(
        lambda value: MIN_PENALTY <= value <= MAX_PENALTY, f"a number from {MIN_PENALTY} to {MAX_PENALTY:.0f}"
    ),
    "frequency_penalty": _penalty,
    "presence_penalty": _penalty,
    "logit_bias": _logit_bias,
    "allowed_token_ids": _token_ids(1),
    "seed": _whole(0, MAX_SEED),
    "stop_sequences": _stop_sequences,
    "stop_token_ids": _token_ids(0),
    "ignore_eos": _boolean,
    "details": _boolean,
    "top_n_tokens": _whole(0, MAX_TOP_N_TOKENS),
    "decoder_input_details": _boolean,
    "return_full_text": _boolean,
}
_SPELLINGS = {"ignore_eos_token": "ignore_eos"}
"""What DJL Serving calls one of them."""
NAMES = frozenset(_CHECKS)
"""Every parameter that a row may carry."""
