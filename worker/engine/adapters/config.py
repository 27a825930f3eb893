"""adapter_config.json -> PEFT's LoraConfig, or the reason why not all of it could be honoured."""

import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from peft import LoraConfig

from worker.engine.rope import ASKS, RopeScaling, read_factor
from worker.errors import AdapterInvalid

CONFIG_FILE = "adapter_config.json"

_CHECKED = frozenset({"init_lora_weights", "peft_type", "task_type"})
_APPLIED = frozenset({
    "alpha_pattern", "bias", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_bias", "modules_to_save", "r", "rank_pattern",
    "target_modules", "trainable_token_indices", "use_dora", "use_rslora",
})  # fmt: skip
_WITHOUT_EFFECT = frozenset({  # on the output of a trained adapter
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config",
    "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config",
})  # fmt: skip
_KEEPS_BASE_WEIGHTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base weights alone. PiSSA, OLoRA, CorDA and their
kin train against a changed base, which an adapter file alone does not carry."""

_PLAIN = re.compile(r"[\w.-]*")
_MATCHING_SECONDS = 5.0
_MAX_CONFIG_BYTES = 1 << 20
_MAX_PATTERN_CHARACTERS = 4096
_TRY_REGEXES = """
import json, re, sys
given = json.load(sys.stdin)
for regex in given["regexes"]:
    try:
        compiled = re.compile(regex)
    except (re.error, RecursionError, OverflowError) as error:
        sys.exit(f"{regex!r} is not a regular expression: {error}")
    for name in given["names"]:
        compiled.fullmatch(name), compiled.match(name)
"""


def read_bytes(path: Path) -> bytes:
    """The file's content. Raises AdapterInvalid when it is missing or too long, and OSError."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_CONFIG_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError) as exc:
        raise AdapterInvalid(f"{path.name} cannot be read: {exc}") from exc
    if len(content) > _MAX_CONFIG_BYTES:
        raise AdapterInvalid(f"{path.name} has more than {_MAX_CONFIG_BYTES} bytes")
    return content


class AdapterConfig(NamedTuple):
    lora: LoraConfig
    rope_factor: float


def read_config(content: bytes, names: Collection[str], rope: RopeScaling) -> AdapterConfig:
    """What an adapter's CONFIG_FILE says, refused if any of it would not be honoured.

    `names` are the base model's modules, which its patterns will be matched with, `rope` what it may ask for
    its positions. Raises AdapterInvalid.
    """
    try:
        raw = msgspec.json.decode(content, type=dict[str, Any])
    except (UnicodeDecodeError, msgspec.MsgspecError, RecursionError) as exc:
        raise AdapterInvalid(f"{CONFIG_FILE} cannot be read: {exc}") from exc
    if raw.get("peft_type") != "LORA":
        raise AdapterInvalid(f"peft_type is {raw.get('peft_type')!r}, only 'LORA' is supported")
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        raise AdapterInvalid(f"task_type is {raw['task_type']!r}, only 'CAUSAL_LM' is supported")
    if raw.get("init_lora_weights", True) not in _KEEPS_BASE_WEIGHTS:
        raise AdapterInvalid(
            f"init_lora_weights is {raw['init_lora_weights']!r}, which changes the base weights: save the "
            "adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    for name, value in raw.items():
        if name not in _APPLIED | _WITHOUT_EFFECT | _CHECKED | ASKS and value and value != "none":
            raise AdapterInvalid(f"{name} is {value!r}, which is not supported")
    _try_regexes(list(_regexes(_check_types(raw))), names)
    factor = read_factor(raw, rope)
    try:
        given = {name: value for name, value in raw.items() if name in _APPLIED}
        # Older releases of PEFT do not know every name; what is off they need not be told.
        lora = LoraConfig(
            **{n: value for n, value in given.items() if value is not None and value is not False}
        )
    except (TypeError, ValueError) as exc:
        raise AdapterInvalid(f"{CONFIG_FILE}: {exc}") from exc
    return AdapterConfig(lora, factor)


TokenIndex = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class _Types(msgspec.Struct):
    """What PEFT itself does not check, and trips over later."""

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    bias: Literal["none", "all", "lora_only"] | None = None
    use_dora: bool | None = None
    lora_bias: bool | None = None
    ensure_weight_tying: bool | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[TokenIndex] | dict[str, list[TokenIndex]] | None = None


def _check_types(raw: dict[str, Any]) -> _Types:
    try:
        types = msgspec.convert(raw, _Types)
    except msgspec.ValidationError as exc:
        raise AdapterInvalid(f"{CONFIG_FILE}: {exc}") from exc
    if not types.target_modules:
        raise AdapterInvalid("target_modules is missing or empty")
    patterns = (types.target_modules, types.exclude_modules, types.layers_pattern)
    texts = [text for text in patterns if isinstance(text, str)]
    saved = types.modules_to_save or ()
    for text in [*texts, *(types.rank_pattern or ()), *(types.alpha_pattern or ()), *saved]:
        if len(text) > _MAX_PATTERN_CHARACTERS:
            limit = f"the limit is {_MAX_PATTERN_CHARACTERS}"
            raise AdapterInvalid(f"a pattern of {CONFIG_FILE} has {len(text)} characters, {limit}")
    return types


def _regexes(types: _Types) -> Iterator[str]:
    """The patterns that are more than plain names, in the form in which PEFT compiles them."""
    for text in (types.target_modules, types.exclude_modules):
        if isinstance(text, str) and not _PLAIN.fullmatch(text):
            yield text
    for text in [*(types.rank_pattern or ()), *(types.alpha_pattern or ())]:
        if not _PLAIN.fullmatch(text):
            yield rf"(.*\.)?({text})$"
    for text in types.modules_to_save or ():
        if not _PLAIN.fullmatch(text):
            yield rf"(^|.*\.){text}($|\..*)"
    layers = [types.layers_pattern] if isinstance(types.layers_pattern, str) else types.layers_pattern
    for text in layers or ():
        if not _PLAIN.fullmatch(text):
            yield rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\."


def _try_regexes(regexes: list[str], names: Collection[str]) -> None:
    """Compile and match an upload's regular expressions where it hurts nobody.

    A pattern like `(a+)+$` can run for years, and Python holds the interpreter's lock all the while: one
    upload would stop the worker, heartbeats and all. So it is tried in another process first.
    """
    if not regexes:
        return
    given = json.dumps({"regexes": regexes, "names": sorted(names)})
    command = [sys.executable, "-I", "-S", "-c", _TRY_REGEXES]
    try:
        tried = subprocess.run(  # noqa: S603 (our own program)
            command, input=given, capture_output=True, text=True, timeout=_MATCHING_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as exc:
        raise AdapterInvalid(
            f"a pattern of {CONFIG_FILE} takes more than {_MATCHING_SECONDS:g} seconds to match: {regexes}"
        ) from exc
    if tried.returncode:
        raise AdapterInvalid(" ".join(tried.stderr.split()) or "a pattern cannot be matched")
