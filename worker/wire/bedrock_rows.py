"""A record of a Bedrock batch file -> Row: `{"recordId", "modelInput"}`.

Of the bodies that Bedrock's models take these are known, by the fields that they have:

| shape    | `modelInput`                                                    | of                   |
|----------|-----------------------------------------------------------------|----------------------|
| llama    | `prompt`, `max_gen_len`, `temperature`, `top_p`                 | Meta Llama           |
| mistral  | `prompt`, `max_tokens`, `stop`, `temperature`, `top_p`, `top_k` | Mistral AI           |
| messages | `messages`, `max_tokens` and more, as OpenAI's chat completions | gpt-oss, Qwen, and … |

A prompt is taken for llama's unless it has a field of mistral's alone. Defaults are Bedrock's own for that
shape. `adapter`, which is ours, names the adapter; without it the job does.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from worker.errors import InvalidLine, InvalidParameters
from worker.jobs import Origin, Row, SamplingParams
from worker.wire.checks import kind, unknown
from worker.wire.draft import Draft
from worker.wire.openai_rows import read_chat, refuse_what_is_native
from worker.wire.parameters import check

LLAMA, MISTRAL, MESSAGES = "llama", "mistral", "messages"
FIELDS = frozenset({"recordId", "modelInput"})

NAMES = {
    LLAMA: {"max_gen_len": "max_new_tokens", "temperature": "temperature", "top_p": "top_p"},
    MISTRAL: {
        "max_tokens": "max_new_tokens",
        "temperature": "temperature",
        "top_p": "top_p",
        "top_k": "top_k",
        "stop": "stop_sequences",
    },
}
"""Parameters of each shape, with ours."""
DEFAULTS: dict[str, dict[str, object]] = {
    LLAMA: {"max_gen_len": 512, "temperature": 0.5, "top_p": 0.9},
    MISTRAL: {"max_tokens": 512, "temperature": 0.5, "top_p": 0.9, "top_k": 50},
}
_MISTRALS_ALONE = NAMES[MISTRAL].keys() - NAMES[LLAMA].keys()


def read_bedrock(draft: Draft, item: object) -> Row:
    """Read one record; raises RowError. `draft` keeps `modelInput`, which the result repeats."""
    if not isinstance(item, dict):
        raise InvalidLine(f"the row is {kind(item)}; it must be an object")
    given = item.get("modelInput")
    body = msgspec.json.encode(given)
    draft.origin = Origin(format="bedrock", body=body)
    draft.read_id(item.get("recordId"), "recordId")
    stranger = unknown(item, FIELDS)
    if stranger is not None:
        raise InvalidLine(f"the row's field {stranger}")
    refuse_what_is_native(draft, "a Bedrock record")
    if not isinstance(given, dict):
        raise InvalidLine(f"the row's modelInput is {kind(given)}; it must be an object")
    said = {name: value for name, value in given.items() if value is not None}
    draft.read_adapter(said.pop("adapter", draft.given.adapter), "modelInput.adapter")
    shape = _shape(said)
    draft.origin = Origin(format="bedrock", shape=shape, body=body)
    if shape == MESSAGES:
        if "model" in said:
            raise InvalidParameters("parameter model is not a record's; what names the adapter is adapter")
        return read_chat(draft, said)
    prompt = said.pop("prompt")
    if not isinstance(prompt, str):
        raise InvalidLine(f"the row's modelInput.prompt is {kind(prompt)}; it must be text")
    return draft.done(text=prompt, params=_params(shape, said))


def _shape(said: Mapping[str, Any]) -> str:
    if ("messages" in said) == ("prompt" in said):
        given = "both prompt and messages" if "prompt" in said else "neither prompt nor messages"
        raise InvalidLine(f"the row's modelInput has {given}; it must have one of them")
    if "messages" in said:
        return MESSAGES
    return LLAMA if _MISTRALS_ALONE.isdisjoint(said) else MISTRAL


def _params(shape: str, said: Mapping[str, Any]) -> SamplingParams:
    names = NAMES[shape]
    stranger = unknown(said, names)
    if stranger is not None:
        raise InvalidParameters(f"parameter {stranger}")
    full = {**DEFAULTS[shape], **said}
    values: dict[str, Any] = {names[name]: check(names[name], value, name) for name, value in full.items()}
    values["do_sample"] = values["temperature"] != 0
    if not values["do_sample"]:
        del values["temperature"]
    return SamplingParams(**values)
