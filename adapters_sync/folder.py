"""Is this folder a LoRA adapter that could be served? Reads the configuration and the headers, no weights.

The worker checks every tensor against the base model when it loads the adapter; what is refused here is
what no base model could serve, and what the one at hand could not where it is known, so that it never
reaches a worker.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from adapters_sync.base_model import BaseModel
from adapters_sync.errors import InvalidAdapter
from adapters_sync.header import TensorInfo, read_header
from adapters_sync.names import (
    CONFIG_FILE,
    PICKLED_WEIGHTS_FILE,
    REQUIRED_FILES,
    WEIGHTS_FILE,
    is_carried,
    shown,
)

MAX_CONFIG_BYTES = 1 << 20
MAX_TARGET_MODULES = 10_000
MAX_RANK = 16_384
"""No module gains from a larger rank than it has features."""


class AdapterSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What a folder that passed the check holds."""

    rank: int
    """The largest rank of any module: `r` or a value of `rank_pattern`."""
    bytes: int
    """The size of all files that are carried."""
    tensors: int
    base_model: str | None
    """`base_model_name_or_path`, as the configuration says it."""


def check_folder(path: Path, *, max_rank: int | None = None, base: BaseModel | None = None) -> AdapterSummary:
    """Check an adapter's folder without loading a weight.

    Raises InvalidAdapter with a reason that names the file or field, the value and the limit. `max_rank`
    None accepts every rank up to MAX_RANK, `base` None every module. Blocking: reads the configuration and
    the safetensors headers.
    """
    limits = [max_rank, base.max_lora_rank if base is not None else None, MAX_RANK]
    files = carried_files(path, code=True)
    for name in REQUIRED_FILES:
        if name not in files:
            raise InvalidAdapter(_why_missing(path, name))
    config = _read_config(path / CONFIG_FILE)
    rank = _check_config(config, min(limit for limit in limits if limit is not None))
    headers = {name: read_header(path / name) for name in files if name.endswith(".safetensors")}
    _check_is_lora(headers[WEIGHTS_FILE])
    if base is not None:
        base.check(headers[WEIGHTS_FILE])
    base_model = config.get("base_model_name_or_path")
    return AdapterSummary(
        rank=rank,
        bytes=sum(status.st_size for status in files.values()),
        tensors=len(headers[WEIGHTS_FILE]),
        base_model=base_model if isinstance(base_model, str) else None,
    )


def carried_files(path: Path, *, code: bool = False) -> dict[str, os.stat_result]:
    """The files of a folder that belong to the adapter: status by relative path, sorted by path.

    Only regular files: a link is no part of an adapter, since it may lead out of the folder or change
    behind its back. The manifests of push and mirror and files that are not carried are left out; `code` is
    whether `model.py` is carried.
    """
    files = {}
    folders = [""]
    while folders:
        folder = folders.pop()
        with os.scandir(path / folder) as entries:
            for entry in entries:
                relative = f"{folder}{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{relative}/")
                elif entry.is_file(follow_symlinks=False) and is_carried(relative, code=code):
                    files[relative] = entry.stat(follow_symlinks=False)
    return dict(sorted(files.items()))


def _why_missing(path: Path, name: str) -> str:
    if (path / name).is_symlink():
        return f"{name} is a link; an adapter is made of regular files"
    if name == WEIGHTS_FILE and (path / PICKLED_WEIGHTS_FILE).exists():
        return f"the weights are a pickle ({PICKLED_WEIGHTS_FILE}); save them as {WEIGHTS_FILE}"
    return f"{name} is missing"


def _read_config(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > MAX_CONFIG_BYTES:
        raise InvalidAdapter(f"{path.name} has {size} bytes; the limit is {MAX_CONFIG_BYTES}")
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidAdapter(f"{path.name} is not a JSON object: {error}") from error


def _check_config(config: Mapping[str, Any], max_rank: int) -> int:
    """The largest rank the configuration asks for, when everything that is checked here is right."""
    if config.get("peft_type") != "LORA":
        kind = _value(config.get("peft_type"))
        raise InvalidAdapter(f"{CONFIG_FILE}: peft_type is {kind}; only LORA is served")
    ranks: dict[str, Any] = {"r": config.get("r"), **_pattern(config, "rank_pattern")}
    for field, rank in ranks.items():
        if type(rank) is not int or rank < 1:
            raise InvalidAdapter(f"{CONFIG_FILE}: {field} is {_value(rank)}; it must be 1 or more")
        if rank > max_rank:
            raise InvalidAdapter(f"{CONFIG_FILE}: {field} is {_value(rank)}; the limit is {max_rank}")
    for field, alpha in {"lora_alpha": config.get("lora_alpha"), **_pattern(config, "alpha_pattern")}.items():
        if field == "lora_alpha" and alpha is None:
            continue  # PEFT's default applies
        if not _is_finite(alpha):
            raise InvalidAdapter(f"{CONFIG_FILE}: {field} is {_value(alpha)}; it must be a finite number")
    _check_targets(config.get("target_modules"))
    return int(max(ranks.values()))


def _is_finite(number: object) -> bool:
    try:
        return type(number) in {int, float} and math.isfinite(number)  # type: ignore[arg-type]
    except OverflowError:  # an integer that no float can hold
        return False


def _pattern(config: Mapping[str, Any], field: str) -> dict[str, Any]:
    pattern = config.get(field)
    if pattern is None:
        return {}
    if not isinstance(pattern, dict):
        raise InvalidAdapter(f"{CONFIG_FILE}: {field} is {_value(pattern)}; it must be an object")
    return {f"{field}[{shown(key)}]": value for key, value in pattern.items()}


def _check_targets(targets: object) -> None:
    if targets is None or isinstance(targets, str):
        return
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise InvalidAdapter(f"{CONFIG_FILE}: target_modules is {_value(targets)}; it must be text or texts")
    if len(targets) > MAX_TARGET_MODULES:
        raise InvalidAdapter(
            f"{CONFIG_FILE}: target_modules names {len(targets)} modules; the limit is {MAX_TARGET_MODULES}"
        )


def _check_is_lora(tensors: Mapping[str, TensorInfo]) -> None:
    if not any("lora_" in name for name in tensors):
        raise InvalidAdapter(f"{WEIGHTS_FILE}: none of its {len(tensors)} tensors is a LoRA tensor")


def _value(value: object) -> str:
    """A value from a JSON document as JSON, in ASCII and not longer than a line."""
    if value is None:
        return "missing"
    try:
        text = json.dumps(value)
    except RecursionError:
        text = "nested too deeply"
    return text if len(text) <= 100 else text[:97] + "..."
