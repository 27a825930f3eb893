"""Settings: one frozen struct, read once from flags, environment and options, with every mistake reported.

A field of a settings struct is `Annotated[type, Meta(description=..., ge=..., pattern=..., extra={...})]`.
The type is bool, int, float, str, Path, a Literal of texts or `tuple[str, ...]` (comma-separated), or one of
these `| None`. `extra` may hold:

    flag      the flag's name, where it is not `--<field>`
    option    the `option.<name>` of serving.properties that also sets the field
    aliases   {text: text} other spellings of a value
    expected  the limits in words, such as what `pattern` means
    secret    True keeps the value out of messages

Precedence: flag, then `LORAMILL_<FIELD>`, then option, then default. An empty text counts as not given.
"""

import difflib
import functools
import math
import re
import types
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import Meta

from adapters_sync.errors import SettingsError

PREFIX = "LORAMILL_"
_BUCKET = r"(?!.*/\.{1,2}(/|\Z))s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
_SEGMENT = r"[^/\x00-\x1f]+"
S3_PREFIX = rf"^{_BUCKET}/({_SEGMENT}/)*\Z"
S3_PREFIX_EXPECTED = "an s3://bucket/prefix/ that ends with a slash"
ADAPTERS_URI = rf"^{_BUCKET}/({_SEGMENT}/)+\Z"
QUEUE_URL = r"^https?://[^/\s]+/\S+\Z"
QUEUE_URL_EXPECTED = "the http(s) URL of a queue"
MODEL = rf"^(?!s3://).|^{_BUCKET}(/{_SEGMENT})*/?\Z"
MODEL_EXPECTED = "a local folder, an s3://bucket/model_id/ prefix or a hub id"

_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
# Kubernetes puts these in every pod of a namespace that has a service called loramill or loramill-*.
_SERVICE_LINK = re.compile(r"LORAMILL_(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SERVICE_URL = re.compile(r"(tcp|udp|sctp)://")

S = TypeVar("S", bound=msgspec.Struct)


class Said(NamedTuple):
    """A value and where it was said, such as `LORAMILL_MAX_LORAS`."""

    origin: str
    value: object


class SettingInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One setting, for documentation, for the command line and for the reader itself."""

    name: str
    env: str
    flag: str
    kind: Any
    """bool, int, float, str, Path, tuple, or Literal for one of `allowed`."""
    type: str
    """`kind` in words."""
    default: object
    help: str
    allowed: tuple[str, ...] = ()
    limits: str = ""
    option: str | None = None
    aliases: dict[str, str] = {}
    secret: bool = False
    meta: Meta


class Reading(msgspec.Struct):
    """What `gather` found: a value for every field, who said it, and what was wrong."""

    values: dict[str, Any]
    origins: dict[str, str]
    """By field; a field that is absent here has its default."""
    mistakes: list[str]
    refused: set[str]
    """Fields whose value was wrong, and which hold their default in `values`."""


def describe(cls: type[msgspec.Struct]) -> list[SettingInfo]:
    """The settings of a struct, in the order of its fields."""
    return list(_infos(cls))


def known_names(*classes: type[msgspec.Struct]) -> frozenset[str]:
    """The environment names of several structs: what `read` and `gather` take as `known`."""
    return frozenset(info.env for cls in classes for info in describe(cls))


def read(
    cls: type[S],
    *,
    environ: Mapping[str, str],
    flags: Mapping[str, object] | None = None,
    options: Mapping[str, Said] | None = None,
    known: Collection[str] = (),
) -> S:
    """Read a settings struct, or raise SettingsError with every mistake. Arguments as for `gather`."""
    reading = gather(cls, environ=environ, flags=flags, options=options, known=known)
    if reading.mistakes:
        raise SettingsError(reading.mistakes)
    return cls(**reading.values)


def gather(
    cls: type[msgspec.Struct],
    *,
    environ: Mapping[str, str],
    flags: Mapping[str, object] | None = None,
    options: Mapping[str, Said] | None = None,
    known: Collection[str] = (),
) -> Reading:
    """Look every field up without raising, so that a caller can add cross-checks to the mistakes.

    `flags` and `options` go by field name; None means not given. `known` names the LORAMILL_ variables of
    the program's other structs: a process that reads only some settings shares its environment with
    processes that read the rest, and only a name that nobody reads is a mistake.
    """
    given = flags or {}
    infos = describe(cls)
    strangers = given.keys() - {info.name for info in infos}
    if strangers:
        raise TypeError(f"{cls.__name__} has no field {', '.join(sorted(strangers))}")
    reading = Reading({}, {}, _unknown(environ, {info.env for info in infos} | set(known)), set())
    for info in infos:
        reading.values[info.name] = info.default
        said = _first(info, given, environ, options or {})
        if said is None:
            continue
        reading.origins[info.name] = said.origin
        try:
            reading.values[info.name] = _convert(info, said.value)
        except ValueError as error:
            reading.refused.add(info.name)
            shown = "***" if info.secret else repr(_text(said.value))
            reading.mistakes.append(f"{info.name}: {shown} (from {said.origin}) {error}")
    return reading


def nearest(name: str, known: Collection[str]) -> str:
    """The known name most like this one."""
    return difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)[0]


def _unknown(environ: Mapping[str, str], known: Collection[str]) -> list[str]:
    return [
        f"{name}: unknown setting (from the environment); the nearest known one is {nearest(name, known)}"
        for name in sorted(environ)
        if name.startswith(PREFIX) and name not in known and not _is_service_link(name, environ[name])
    ]


def _is_service_link(name: str, value: str) -> bool:
    return bool(_SERVICE_LINK.fullmatch(name) or (name.endswith("_PORT") and _SERVICE_URL.match(value)))


def _first(
    info: SettingInfo,
    flags: Mapping[str, object],
    environ: Mapping[str, str],
    options: Mapping[str, Said],
) -> Said | None:
    sources = (
        Said(info.flag, flags.get(info.name)),
        Said(info.env, environ.get(info.env)),
        options.get(info.name, Said("", None)),
    )
    return next((said for said in sources if said.value is not None and _text(said.value)), None)


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value).strip()


def _convert(info: SettingInfo, raw: object) -> object:
    text = _text(raw)
    if info.kind is tuple:
        items = tuple(item.strip() for item in text.split(",") if item.strip())
        for item in items:
            _check(info, item)
        return items
    value = _parse(info, text)
    _check(info, value)
    return value


def _parse(info: SettingInfo, text: str) -> object:
    text = info.aliases.get(text.lower(), text)
    lowered = text.lower()
    if info.kind is bool and lowered in _BOOLEANS:
        return _BOOLEANS[lowered]
    if info.kind is int and re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        return int(text)
    if info.kind is float and _is_number(text):
        return float(text)
    if info.kind is Literal and lowered in info.allowed:
        return lowered
    if info.kind is Path:
        return _expand(text)
    if info.kind is str:
        return text
    raise ValueError(f"must be {info.type}")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _expand(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"names a home folder that cannot be found: {error}") from error


def _check(info: SettingInfo, value: object) -> None:
    meta = info.meta
    if isinstance(value, int | float):
        within = (meta.ge is None or value >= meta.ge) and (meta.le is None or value <= meta.le)
        if not within or (meta.gt is not None and value <= meta.gt):
            raise ValueError(f"must be {info.limits}")
    if isinstance(value, str) and meta.pattern is not None and not re.search(meta.pattern, value):
        raise ValueError(f"must be {info.limits}")


@functools.cache
def _infos(cls: type[msgspec.Struct]) -> tuple[SettingInfo, ...]:
    return tuple(_info(field) for field in msgspec.structs.fields(cls))


def _info(field: msgspec.structs.FieldInfo) -> SettingInfo:
    hint, *metas = get_args(field.type) if get_origin(field.type) is Annotated else (field.type,)
    meta = next((one for one in metas if isinstance(one, Meta)), Meta())
    if get_origin(hint) in {Union, types.UnionType}:
        hint = next(one for one in get_args(hint) if one is not type(None))
    extra = meta.extra or {}
    kind = get_origin(hint) or hint
    allowed = get_args(hint) if kind is Literal else ()
    return SettingInfo(
        name=field.name,
        env=PREFIX + field.name.upper(),
        flag=extra.get("flag", "--" + field.name.replace("_", "-")),
        kind=kind,
        type=_in_words(kind, allowed, extra.get("aliases", {})),
        default=field.default,
        help=meta.description or "",
        allowed=allowed,
        limits=_limits(meta),
        option=extra.get("option"),
        aliases=extra.get("aliases", {}),
        secret=extra.get("secret", False),
        meta=meta,
    )


def _in_words(kind: Any, allowed: tuple[str, ...], aliases: Mapping[str, str]) -> str:
    if kind is Literal:
        return f"one of {', '.join(allowed)}"
    return " or ".join([_WORDS[kind], *aliases])


_WORDS = {
    bool: "true or false (1, 0, yes, no)",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    tuple: "a comma-separated list",
}


def _limits(meta: Meta) -> str:
    if "expected" in (meta.extra or {}):
        return str((meta.extra or {})["expected"])
    bounds = [("above", meta.gt), ("at least", meta.ge), ("at most", meta.le)]
    in_words = " and ".join(f"{words} {bound}" for words, bound in bounds if bound is not None)
    return in_words or (f"of the form {meta.pattern}" if meta.pattern else "")


class SyncSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the mirror needs to know; the worker's settings extend these."""

    model: Annotated[
        str | None,
        Meta(
            description="Base model: a local folder, an s3://bucket/model_id/ prefix, or a hub id.",
            pattern=MODEL,
            extra={"expected": MODEL_EXPECTED},
        ),
    ] = None
    adapters_dir: Annotated[
        Path | None,
        Meta(
            description="Folder of adapters, by name. Default: <MODEL>/adapters when MODEL is a local "
            "folder, else below CACHE_DIR."
        ),
    ] = None
    adapters_uri: Annotated[
        str | None,
        Meta(
            description="S3 prefix that is mirrored to ADAPTERS_DIR. Default: <MODEL>adapters/ when MODEL is "
            "one itself.",
            pattern=ADAPTERS_URI,
            extra={"expected": "an s3://bucket/model_id/adapters/ that ends with a slash"},
        ),
    ] = None
    cache_dir: Annotated[
        Path | None,
        Meta(description="Where downloads and conversions are kept. Default: ~/.cache/loramill."),
    ] = None
    sync_interval_seconds: Annotated[
        float, Meta(description="Pause between two listings of ADAPTERS_URI.", ge=1, le=86_400)
    ] = 30.0
    settle_seconds: Annotated[
        float,
        Meta(
            description="How long an adapter that was uploaded without a manifest must stay unchanged to "
            "count as whole.",
            ge=0,
            le=86_400,
        ),
    ] = 60.0
    adapters_events_queue_url: Annotated[
        str | None,
        Meta(
            description="SQS queue of S3 events: one of a key under ADAPTERS_URI has the mirror list at "
            "once. What is read there is deleted, so each mirror needs a queue of its own. Default: none.",
            pattern=QUEUE_URL,
            extra={"expected": QUEUE_URL_EXPECTED},
        ),
    ] = None
    custom_code: Annotated[
        bool,
        Meta(
            description="Run Python code that comes with the model or with adapters, in a process of its own "
            "with the worker's rights: the handler ENTRY_POINT, which answers requests and rows, or else "
            "input and output formatters. A mirror carries an adapter's model.py only then. Options that the "
            "worker does not know are the handler's."
        ),
    ] = False
    log_format: Annotated[
        Literal["auto", "text", "json"],
        Meta(description="Log lines for people or for machines; auto is text on a terminal, else json."),
    ] = "auto"

    @property
    def model_uri(self) -> str | None:
        """The s3 prefix of the model's folder, with a trailing slash; None for any other model."""
        if self.model is None or not self.model.startswith("s3://"):
            return None
        return self.model.rstrip("/") + "/"

    @property
    def model_dir(self) -> Path | None:
        """The model's folder on this machine; None for an s3 prefix, a hub id or no model."""
        if self.model is None or self.model_uri is not None:
            return None
        path = Path(self.model).expanduser()
        return None if _HUB_ID.fullmatch(self.model) and not path.is_dir() else path

    @property
    def cache_path(self) -> Path:
        return self.cache_dir or Path.home() / ".cache" / "loramill"

    @property
    def mirror_uri(self) -> str | None:
        """The s3 prefix to mirror, said or implied by an s3 model; None when there is nothing to mirror."""
        return self.adapters_uri or (self.model_uri and self.model_uri + "adapters/")

    @property
    def adapters_path(self) -> Path | None:
        """The folder of adapters, which need not exist; None when no setting leads to one.

        The mirror keeps its versions beside this folder, so each mirrored prefix gets a parent of its own.
        """
        if self.adapters_dir is not None:
            return self.adapters_dir
        if self.model_dir is not None:
            return self.model_dir / "adapters"
        if self.mirror_uri is not None:
            return self.cache_path / "s3" / self._below_cache(self.mirror_uri) / "adapters"
        return None if self.model is None else self.cache_path / "hub" / self.model / "adapters"

    @staticmethod
    def _below_cache(uri: str) -> str:
        return uri.removeprefix("s3://").rstrip("/").removesuffix("/adapters")
