"""What DJL Serving's users say: serving.properties, OPTION_*, and the variables of its starting guide.

The file wins over OPTION_*, and these over DJL_VARIABLES. Of the other keys of serving.properties, those in
IGNORED_KEYS, with or without DJL's device prefix (`gpu.maxWorkers`), are accepted, because they size DJL's
own worker pool, and so are options that ask for what is so anyway, those in AS_IT_IS. Any other key is a
mistake.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import javaproperties

from adapters_sync.settings import Said, SettingInfo, nearest

IGNORED_KEYS = frozenset({
    "batchSize", "batch_size", "engine", "job_queue_size", "load_on_devices", "log_model_metric",
    "log_request_metric", "maxBatchDelay", "maxIdleTime", "maxWorkers", "max_batch_delay", "max_idle_time",
    "max_workers", "metrics_aggregation", "minWorkers", "min_workers", "required_memory_mb",
    "reserved_memory_mb", "response_timeout", "retry_threshold",
})  # fmt: skip
_YES_OR_NO = ("true", "false", "1", "0", "yes", "no")
AS_IT_IS = {
    "adapters": ("adapters",),
    "async_mode": _YES_OR_NO,
    "device_map": ("auto",),
    "enable_streaming": ("false", "0", "no"),
    "mpi_mode": _YES_OR_NO,
    "output_formatter": ("json",),
    "parallel_loading": _YES_OR_NO,
    "rolling_batch": ("auto", "vllm", "trtllm", "lmi-dist", "scheduler", "disable"),
    "task": ("auto", "text-generation"),
}
"""Options that choose among DJL Serving's ways, and their values that mean what the worker does anyway."""
DJL_VARIABLES = {
    "HF_MODEL_ID": "model_id",
    "HF_MODEL_TRUST_REMOTE_CODE": "trust_remote_code",
    "TENSOR_PARALLEL_DEGREE": "tensor_parallel_degree",
}
"""Variables of DJL Serving's starting guide, and the settings that they are."""
_INSTEAD = {
    "gpu_memory_utilization": "LORAMILL_MEMORY_SHARE, which is a part of what the weights leave free",
    "revision": "LORAMILL_MODEL, as a folder with that revision in it",
}

BATCH_KEYS = frozenset({"batch_size", "batchSize"})
"""What DJL calls the setting of a custom handler's batches; without one, of those above."""
_WHOLE_CALLS_ONLY = {"rolling_batch": ("disable",), "mpi_mode": ("false", "0", "no")}
"""Options that ask for another way of calling handlers, and the values that do not."""


class Found(NamedTuple):
    """What was said."""

    options: dict[str, Said]
    """By field of the settings."""
    mistakes: list[str]
    strangers: list[str]
    """What is wrong with options that are no setting: a custom handler may know them."""


class DjlOptions:
    """The options of a settings struct, and what else may be said where they are."""

    def __init__(self, infos: Collection[SettingInfo]) -> None:
        self._fields = frozenset(info.name for info in infos)
        self._field_of = {info.option: info.name for info in infos if info.option is not None}
        self._spellings = {option.lower(): option for option in self._field_of}
        """What is meant by the part of OPTION_<NAME> that follows, in lower case."""

    def read(self, environ: Mapping[str, str], properties: str | None) -> Found:
        """All of it; `properties` is the text of serving.properties, if there is one."""
        found = Found({}, [], [])
        for name, field in DJL_VARIABLES.items():
            if environ.get(name, "").strip():
                found.options[field] = Said(name, environ[name])
        self._read_environment(environ, found)
        self._read_properties(properties, found)
        return found

    def said(self, environ: Mapping[str, str], properties: str | None) -> dict[str, str]:
        """Every option that was given, known or not, by its name."""
        said = {
            self._spellings.get(name.lower(), name.lower()): value
            for variable, value in sorted(environ.items())
            if variable.isupper() and (name := variable.removeprefix("OPTION_")) != variable
        }
        for key, value in _parse(properties, []).items():
            if key.startswith("option."):
                said[key.removeprefix("option.")] = value
        return {name: value.strip() for name, value in said.items() if value.strip()}

    def _read_environment(self, environ: Mapping[str, str], found: Found) -> None:
        for name, value in sorted(environ.items()):
            if not name.startswith("OPTION_") or not value.strip():
                continue
            said = name.removeprefix("OPTION_").lower()
            option = self._spellings.get(said, said) if name.isupper() else ""
            if option in self._field_of:
                found.options[self._field_of[option]] = Said(name, value)
            else:
                known = (f"OPTION_{option.upper()}" for option in self._field_of)
                wrong = self._strange(name, option, value, "unknown option (environment)", known)
                found.strangers.extend(wrong)

    def _read_properties(self, text: str | None, found: Found) -> None:
        for key, value in _parse(text, found.mistakes).items():
            is_option = key.startswith("option.")
            option = key.removeprefix("option.") if is_option else ""
            field = "batch_size" if key in BATCH_KEYS else self._field_of.get(option)
            if field is not None and value.strip():
                found.options[field] = Said(f"{key} in serving.properties", value)
            elif field is None and value.strip() and not _is_ignored(key):
                known = (*(f"option.{option}" for option in self._field_of), *IGNORED_KEYS)
                wrong = self._strange(key, option, value, "unknown key (serving.properties)", known)
                (found.strangers if is_option else found.mistakes).extend(wrong)

    def _strange(self, key: str, option: str, value: str, what: str, known: Iterable[str]) -> list[str]:
        """What is wrong with an option that is no setting, if anything is."""
        harmless = AS_IT_IS.get(option, ())
        if value.strip().lower() in harmless:
            return []
        if harmless:
            limit = f"it must be {' or '.join(harmless)}, or left unset"
            return [f"{key}: {value!r} is not what is done here; {limit}"]
        instead = f"LORAMILL_{option.upper()}" if option in self._fields else _INSTEAD.get(option)
        if instead is not None:
            return [f"{key}: {what}; what there is instead is {instead}"]
        return [f"{key}: {what}; the nearest known one is {nearest(key, list(known))}"]


def ignored_keys(properties: str | None) -> list[str]:
    """The keys of serving.properties that have no effect here."""
    return [key for key in _parse(properties, []) if _is_ignored(key) and key != "engine"]


def refuse_other_calls(options: Mapping[str, str]) -> list[str]:
    """What options of a custom handler ask for in vain."""
    return [
        f"{name}: {options[name]!r} (an option of the handler) asks for calls that custom handlers do not "
        f"get here; it must be {' or '.join(harmless)}, or left unset"
        for name, harmless in _WHOLE_CALLS_ONLY.items()
        if options.get(name, harmless[0]).lower() not in harmless
    ]


def _is_ignored(key: str) -> bool:
    return re.sub(r"^(?!option\.)[a-z]+\.", "", key) in IGNORED_KEYS


def _parse(text: str | None, mistakes: list[str]) -> dict[str, str]:
    try:
        return dict(javaproperties.loads(text or ""))
    except ValueError as error:
        mistakes.append(f"serving.properties: not a Java properties file: {error}")
        return {}
