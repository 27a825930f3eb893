"""A request of an OpenAI batch file -> Row: `{"custom_id", "method", "url", "body"}`.

The bodies are those of `/v1/chat/completions` and `/v1/completions`, with the defaults of that API: a row
without `temperature` is sampled at 1. A field that would change the answer and is not served is refused.
"""

from collections.abc import Collection, Mapping
from typing import Any

from worker.errors import InvalidLine, InvalidParameters
from worker.jobs import Origin, Row, SamplingParams, Task
from worker.wire.checks import kind, show, unknown
from worker.wire.draft import Draft
from worker.wire.parameters import check, refuse
from worker.wire.prompts import read_messages, read_token_ids

CHAT, COMPLETION = "chat", "completion"
URLS = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETION}
FIELDS = frozenset({"custom_id", "method", "url", "body"})

COMPLETION_TOKENS = 16
"""Tokens of a completion that does not say how many; a chat answer then goes on to `max_model_len`."""
MAX_COMPLETION_LOGPROBS = 5

SAMPLED = {
    "top_p": "top_p",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "logit_bias": "logit_bias",
    "seed": "seed",
    # As vLLM calls them.
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "min_tokens": "min_new_tokens",
    "ignore_eos": "ignore_eos",
    "stop_token_ids": "stop_token_ids",
    "allowed_token_ids": "allowed_token_ids",
}
"""Parameters that mean what ours do, with ours."""
WITHOUT_EFFECT = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
)
"""Fields that say nothing of the answer."""
_ONLY: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "stream_options": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
}
"""Fields of which this is all that is served, beside null."""
_BOTH = SAMPLED.keys() | WITHOUT_EFFECT | {
    "model", "stop", "max_tokens", "temperature", "logprobs", "n", "stream", "stream_options",
}  # fmt: skip
CHAT_NAMES = _BOTH | {"messages", "max_completion_tokens", "top_logprobs", "response_format"}
COMPLETION_NAMES = _BOTH | {"prompt", "echo", "best_of", "suffix"}


def read_openai(draft: Draft, item: object) -> Row:
    """Read one request; raises RowError."""
    if not isinstance(item, dict):
        raise InvalidLine(f"the row is {kind(item)}; it must be an object")
    draft.origin = Origin(format="openai")
    draft.read_id(item.get("custom_id"), "custom_id", required=True)
    stranger = unknown(item, FIELDS)
    if stranger is not None:
        raise InvalidLine(f"the row's field {stranger}")
    refuse_what_is_native(draft, "an OpenAI request")
    if item.get("method") != "POST":
        raise InvalidLine(f"the row's method is {show(item.get('method'))}; it must be 'POST'")
    url, body = item.get("url"), item.get("body")
    if not isinstance(url, str) or url not in URLS:
        raise InvalidLine(f"the row's url is {show(url)}; it must be {' or '.join(URLS)}")
    if not isinstance(body, dict):
        raise InvalidLine(f"the row's body is {kind(body)}; it must be an object")
    said = {name: value for name, value in body.items() if value is not None}
    _read_model(draft, said.get("model"), URLS[url])
    return (read_chat if URLS[url] == CHAT else _read_completion)(draft, said)


def refuse_what_is_native(draft: Draft, what: str) -> None:
    """Raise InvalidLine if the job says what a row of another format cannot take."""
    if draft.given.task is not Task.GENERATE:
        raise InvalidLine(f"{what} cannot be scored; task score takes native rows")
    if draft.given.parameters:
        raise InvalidParameters(f"the job has parameters, which are for native rows; {what} has its own")


def read_chat(draft: Draft, said: Mapping[str, Any]) -> Row:
    """Read the body of a chat completion without its nulls; `model` is not looked at. Raises RowError."""
    _check_names(said, CHAT_NAMES)
    messages = read_messages(said.get("messages"), parts=True)
    values = _sampling(said)
    if check("details", said.get("logprobs", False), "logprobs"):
        values["details"] = True
        values["top_n_tokens"] = check("top_n_tokens", said.get("top_logprobs", 0), "top_logprobs")
    elif "top_logprobs" in said:
        raise InvalidParameters("parameter top_logprobs is there without logprobs, which must be true")
    limits = [name for name in ("max_completion_tokens", "max_tokens") if name in said]
    if limits:
        values["max_new_tokens"] = check("max_new_tokens", said[limits[0]], limits[0])
    if len(limits) == 2 and said[limits[1]] != said[limits[0]]:
        raise refuse("max_tokens", said["max_tokens"], "absent, or what max_completion_tokens is")
    return _row(draft, values, fills=not limits, messages=messages)


def _read_completion(draft: Draft, said: Mapping[str, Any]) -> Row:
    _check_names(said, COMPLETION_NAMES)
    prompt = _prompt(said.get("prompt"))
    values = _sampling(said)
    limit = said.get("max_tokens", COMPLETION_TOKENS)
    values["max_new_tokens"] = check("max_new_tokens", limit, "max_tokens")
    values["return_full_text"] = check("return_full_text", said.get("echo", False), "echo")
    if "logprobs" in said:
        most = said["logprobs"]
        if isinstance(most, bool) or not isinstance(most, int) or not 0 <= most <= MAX_COMPLETION_LOGPROBS:
            raise refuse("logprobs", most, f"a whole number from 0 to {MAX_COMPLETION_LOGPROBS}")
        if most and values["return_full_text"]:
            raise refuse("logprobs", most, "0 with echo: alternatives are known for generated tokens alone")
        values |= {"details": True, "top_n_tokens": most, "prompt_log_probs": values["return_full_text"]}
    return _row(draft, values, **prompt)


def _row(draft: Draft, values: dict[str, Any], **fields: Any) -> Row:
    params = SamplingParams(**values)
    if params.min_new_tokens > params.max_new_tokens and not fields.get("fills"):
        raise refuse("min_tokens", params.min_new_tokens, f"at most max_tokens, {params.max_new_tokens}")
    return draft.done(params=params, **fields)


def _read_model(draft: Draft, value: object, shape: str) -> None:
    """`model` is an adapter's name, or the base model's, which leaves the adapter to the job."""
    if not isinstance(value, str) or not value:
        raise InvalidLine(f"the row's body.model is {show(value)}; it must be text that is not empty")
    draft.origin = Origin(format="openai", shape=shape, model=value)
    known = draft.given.base_models
    is_base = value in known if known is not None else "/" in value
    if is_base:
        draft.read_adapter(draft.given.adapter, "adapters")
    else:
        draft.read_adapter(value, "body.model")


def _check_names(said: Mapping[str, Any], known: Collection[str]) -> None:
    stranger = unknown(said, known)
    if stranger is not None:
        raise InvalidParameters(f"parameter {stranger}")
    for name, served in _ONLY.items():
        if name in said and not any(said[name] == one and type(said[name]) is type(one) for one in served):
            limit = f"absent or {_exactly(served[0])}" if served else "absent"
            raise refuse(name, said[name], limit)


def _exactly(value: object) -> str:
    return '{"type": "text"}' if isinstance(value, dict) else show(value)


def _sampling(said: Mapping[str, Any]) -> dict[str, Any]:
    """What both bodies have in common, by our names."""
    values = {own: check(own, said[name], name) for name, own in SAMPLED.items() if name in said}
    temperature = check("temperature", said.get("temperature", 1), "temperature")
    values["do_sample"] = temperature != 0
    if temperature:
        values["temperature"] = temperature
    stop = said.get("stop", [])
    values["stop_sequences"] = check("stop_sequences", [stop] if isinstance(stop, str) else stop, "stop")
    return values


def _prompt(value: object) -> dict[str, str | tuple[int, ...]]:
    """A text or token ids, by itself or as the only one of a list."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return {"text": value}
    tokens = read_token_ids(value, "body.prompt")
    if tokens is None:
        raise InvalidLine(
            f"the row's body.prompt is {kind(value)}; it must be one text, or one list of token ids"
        )
    return {"tokens": tokens}
