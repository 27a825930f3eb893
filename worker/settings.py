"""The worker's settings: LORAMILL_* and flags, and the `option.*` family that DJL Serving's users know.

Options come from `serving.properties` in the model's folder and from `OPTION_<NAME>`; the file wins over
OPTION_*, and a flag or a LORAMILL_* variable wins over both: see `worker.djl_options`. Options that ask for
what this version does not do are refused, never swallowed.
"""

import hashlib
import ipaddress
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

from msgspec import Meta

from adapters_sync import settings as reader
from adapters_sync.settings import (
    MODEL,
    MODEL_EXPECTED,
    QUEUE_URL,
    QUEUE_URL_EXPECTED,
    S3_PREFIX,
    S3_PREFIX_EXPECTED,
    Reading,
    SyncSettings,
    describe,
)
from worker.djl_options import AS_IT_IS, BATCH_KEYS, DjlOptions, ignored_keys, refuse_other_calls
from worker.errors import SettingsError

_FACTOR = r"(1000(\.0*)?|[1-9][0-9]{0,2}(\.[0-9]*)?)"
_FACTORS = rf"^(\(\s*{_FACTOR}(\s*,\s*{_FACTOR})*\s*,?\s*\)|{_FACTOR}(\s*,\s*{_FACTOR})*)\Z"
_BUILT_IN = re.compile(r"djl_python(\.\w+)*")
_S3 = {"expected": S3_PREFIX_EXPECTED}
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_Dtype = Literal["auto", "float32", "float16", "bfloat16"]


class Settings(SyncSettings, frozen=True, kw_only=True):
    """Everything the worker can be told. Derived values are properties; None means the derived default."""

    queue_url: Annotated[
        str | None,
        Meta(
            description="The SQS queue. Without it and OUTPUT_PREFIXES a worker answers calls alone.",
            pattern=QUEUE_URL,
            extra={"expected": QUEUE_URL_EXPECTED},
        ),
    ] = None
    output_prefixes: Annotated[
        tuple[str, ...],
        Meta(description="S3 prefixes that jobs may write to.", pattern=S3_PREFIX, extra=_S3),
    ] = ()
    input_prefixes: Annotated[
        tuple[str, ...],
        Meta(
            description="S3 prefixes that jobs may read their rows from. Default: any.",
            pattern=S3_PREFIX,
            extra=_S3,
        ),
    ] = ()
    device: Annotated[
        str,
        Meta(
            description="Where the model runs.",
            pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)\Z",
            extra={"expected": "auto, cpu, cuda or cuda:<number>"},
        ),
    ] = "auto"

    max_num_seqs: Annotated[
        int,
        Meta(
            description="Most rows that run at once.",
            ge=1,
            le=65_536,
            extra={"option": "max_rolling_batch_size"},
        ),
    ] = 16
    max_num_batched_tokens: Annotated[
        int,
        Meta(
            description="Most tokens in one step.", ge=1, extra={"option": "max_rolling_batch_prefill_tokens"}
        ),
    ] = 2048
    max_model_len: Annotated[
        int | None,
        Meta(
            description="Most tokens of a row, prompt and answer together. Default: the model's own limit.",
            ge=2,
            extra={"option": "max_model_len"},
        ),
    ] = None
    memory_share: Annotated[
        float | None,
        Meta(
            description="Part of the memory left free by the weights that the KV cache may take. "
            "Default: 0.4 on a CPU, 0.85 on a GPU.",
            gt=0,
            le=1,
            extra={"expected": "a number above 0 and at most 1"},
        ),
    ] = None
    kernel_tuning_seconds: Annotated[
        float,
        Meta(
            description="How long a GPU worker may time its LoRA kernels at start. What it finds is kept "
            "in CACHE_DIR for this kind of GPU; 0 takes what is there, and defaults.",
            ge=0,
            le=3600,
        ),
    ] = 30.0
    max_passed_over: Annotated[
        int,
        Meta(
            description="Most rows that may pass one that came earlier: while it waits for room among the "
            "adapters in host memory, and once more while it waits for its start.",
            ge=0,
        ),
    ] = 256
    prefix_reuse: Annotated[
        bool, Meta(description="Compute what rows of one adapter have in common at their beginning once.")
    ] = True
    max_rows_per_job: Annotated[
        int, Meta(description="Most rows that a message may carry.", ge=1, le=1_000_000)
    ] = 10_000
    max_in_flight_rows: Annotated[
        int | None,
        Meta(
            description="Rows taken from the queue and not finished at which polling pauses. "
            "Default: 4 x MAX_NUM_SEQS.",
            ge=1,
        ),
    ] = None

    max_in_flight_tokens: Annotated[
        int | None,
        Meta(
            description="Likewise for their tokens, prompts and the most they may generate. "
            "Default: 4 x what the KV cache has room for.",
            ge=1,
        ),
    ] = None
    max_in_flight_bytes: Annotated[int, Meta(description="Likewise for the bytes of the messages.", ge=1)] = (
        128 << 20
    )
    rows_per_part: Annotated[
        int,
        Meta(
            description="A larger input is split into parts of so many rows, each with a message of its own.",
            ge=1,
        ),
    ] = 1000

    visibility_timeout_seconds: Annotated[
        int,
        Meta(
            description="How long a message stays hidden after each heartbeat, of which there are three.",
            ge=10,
            le=43_200,
        ),
    ] = 120
    drain_timeout_seconds: Annotated[
        float, Meta(description="How long running rows may take to finish at shutdown.", ge=0, le=43_200)
    ] = 90.0
    adapter_wait_seconds: Annotated[
        float,
        Meta(description="How long a row waits for an adapter that is not there yet.", ge=0, le=43_200),
    ] = 30.0
    sync: Annotated[bool, Meta(description="Run the adapter mirror inside the worker.")] = False
    workflows: Annotated[
        tuple[str, ...],
        Meta(
            description="workflow.json files, folders with one, or s3:// URIs of either, to be served "
            "from the start."
        ),
    ] = ()
    exit_when_idle_seconds: Annotated[
        float | None,
        Meta(
            description="End when the queue has been empty, and nobody has called, for this long. "
            "Default: never.",
            ge=0,
            extra={"flag": "--exit-when-idle"},
        ),
    ] = None

    dead_letter: Annotated[
        Literal["store", "redrive"],
        Meta(
            description="A message that can never succeed and has no known output: store writes it to S3 and "
            "deletes it, redrive leaves it to the queue's own redrive policy."
        ),
    ] = "store"
    dead_letter_uri: Annotated[
        str | None,
        Meta(
            description="Where dead letters go. Default: <first of OUTPUT_PREFIXES>dead-letter/.",
            pattern=S3_PREFIX,
            extra=_S3,
        ),
    ] = None

    http_host: Annotated[
        str,
        Meta(description="Address of calls, of the management of adapters, and of /metrics, /live, /ready."),
    ] = "127.0.0.1"
    http_port: Annotated[int, Meta(description="0 takes any free port.", ge=0, le=65_535)] = 8080
    http_token: Annotated[
        str | None,
        Meta(
            description="Bearer token; required when HTTP_HOST is not a loopback address.",
            extra={"secret": True},
        ),
    ] = None

    served_model_name: Annotated[
        str | None,
        Meta(
            description="What calls and the adapter management API know the model by. Default: the last part "
            "of MODEL.",
            pattern=r"^[A-Za-z0-9][\w.-]{0,127}\Z",
            extra={"expected": "1 to 128 letters, digits, dots, dashes and underscores"},
        ),
    ] = None
    http_max_calls: Annotated[
        int, Meta(description="Calls that may be at work at once; others are refused with 503.", ge=1)
    ] = 64
    http_max_rows: Annotated[
        int,
        Meta(
            description="Likewise for the rows of all calls together; a single call may have no more.", ge=1
        ),
    ] = 256
    http_max_body_bytes: Annotated[int, Meta(description="Most bytes of a call's body.", ge=1)] = 4 << 20
    http_timeout_seconds: Annotated[
        float,
        Meta(
            description="How long a row of a call may take.",
            gt=0,
            le=43_200,
            extra={"expected": "a number above 0 and at most 43200"},
        ),
    ] = 60.0

    model_id: Annotated[
        str | None,
        Meta(
            description="Where the weights are, when they are not in MODEL.",
            pattern=MODEL,
            extra={"option": "model_id", "expected": MODEL_EXPECTED},
        ),
    ] = None
    dtype: Annotated[
        _Dtype,
        Meta(
            description="Type of the base model's weights. auto is the model's own on a GPU and on a "
            "processor with bfloat16 instructions, else float32.",
            extra={"option": "dtype", "aliases": _DTYPES},
        ),
    ] = "auto"
    trust_remote_code: Annotated[
        bool,
        Meta(description="Run Python code that comes with the model.", extra={"option": "trust_remote_code"}),
    ] = False
    entry_point: Annotated[
        str | None,
        Meta(
            description="The custom handler: a Python file in MODEL, or a module there. Default: model.py. "
            "djl_python.* is DJL Serving's own, in whose place is the worker's engine.",
            pattern=r"^(?!/)(?!.*(^|/)\.{1,2}(/|\Z))([^\x00-\x1f:]+\.py|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*)\Z",
            extra={
                "option": "entryPoint",
                "expected": "the path of a .py file inside the model's folder, or a module's name",
            },
        ),
    ] = None
    batch_size: Annotated[
        int,
        Meta(
            description="Most requests that go to a custom handler together, if they wait. In "
            "serving.properties batch_size, or batchSize.",
            ge=1,
            le=999,
        ),
    ] = 1
    predict_timeout_seconds: Annotated[
        float,
        Meta(
            description="How long a custom handler may take for a call; then its process is replaced.",
            gt=0,
            le=86_400,
            extra={"option": "predict_timeout"},
        ),
    ] = 120.0
    model_loading_timeout_seconds: Annotated[
        float,
        Meta(
            description="How long a custom handler may take to load and to answer its first call.",
            gt=0,
            le=86_400,
            extra={"option": "model_loading_timeout"},
        ),
    ] = 240.0
    tensor_parallel_degree: Annotated[
        int,
        Meta(
            description="Devices that share the model, each with a process: GPUs from the first on, or parts "
            "of the CPU. max is all the GPUs that there are.",
            ge=0,
            le=64,
            extra={
                "option": "tensor_parallel_degree",
                "aliases": {"max": "0"},
                "expected": "from 1 to 64, or max",
            },
        ),
    ] = 1

    enable_lora: Annotated[
        bool | None,
        Meta(
            description="Serve adapters. Default: true when any setting leads to a folder of adapters.",
            extra={"option": "enable_lora"},
        ),
    ] = None
    max_loras: Annotated[
        int,
        Meta(description="Distinct adapters in one batch.", ge=1, le=4096, extra={"option": "max_loras"}),
    ] = 4
    max_lora_rank: Annotated[
        int,
        Meta(
            description="An adapter of a higher rank is refused.",
            ge=1,
            le=65_536,
            extra={"option": "max_lora_rank"},
        ),
    ] = 16
    max_cpu_loras: Annotated[
        int | None,
        Meta(
            description="Adapters kept in host memory. Default: MAX_LORAS.",
            ge=1,
            extra={"option": "max_cpu_loras"},
        ),
    ] = None
    max_cpu_lora_bytes: Annotated[
        int | None,
        Meta(description="Bytes that adapters may take in host memory. Default: no limit.", ge=1),
    ] = None
    metrics_adapters: Annotated[
        int,
        Meta(description="Most adapters that metrics name; the others are counted together.", ge=0),
    ] = 100
    lora_dtype: Annotated[
        _Dtype,
        Meta(
            description=(
                "Type of the adapters' weights; auto is the base model's, or float32 where the processor "
                "multiplies in that."
            ),
            extra={"option": "lora_dtype", "aliases": _DTYPES},
        ),
    ] = "auto"
    lora_mode: Annotated[
        Literal["unmerged", "auto", "merged"],
        Meta(
            description="unmerged adds adapters beside the base model. merged is for a worker that serves "
            "one: it is merged into a copy of the weights, which steps whose rows all have it use. auto "
            "does so where steps with one adapter go on for long.",
            extra={"option": "lora_mode"},
        ),
    ] = "unmerged"
    fully_sharded_loras: Annotated[
        bool,
        Meta(
            description="With TENSOR_PARALLEL_DEGREE, divide both halves of an adapter among the devices: "
            "less memory, and one exchange more. Else one of them.",
            extra={"option": "fully_sharded_loras"},
        ),
    ] = True
    lora_extra_vocab_size: Annotated[
        int,
        Meta(
            description="Tokens that an adapter may add; one that brings more is refused.",
            ge=0,
            extra={"option": "lora_extra_vocab_size"},
        ),
    ] = 256
    long_lora_scaling_factors: Annotated[
        str | None,
        Meta(
            description="Factors of linear rope scaling that adapters may ask for, each row its own: "
            "`3.0,4.0` or `(3.0, 4.0)`. MAX_MODEL_LEN goes up with the largest.",
            pattern=_FACTORS,
            extra={
                "option": "long_lora_scaling_factors",
                "expected": "numbers from 1 to 1000 with commas between them, in parentheses or not",
            },
        ),
    ] = None

    def __repr__(self) -> str:
        """Every setting that differs from its default, without the token."""
        said = (
            f"{info.name}={'***' if info.secret else repr(getattr(self, info.name))}"
            for info in describe(Settings)
            if getattr(self, info.name) != info.default
        )
        return f"Settings({', '.join(said)})"

    @property
    def weights(self) -> str | None:
        """Where the base model's weights are: a folder, an s3 prefix or a hub id."""
        return self.model_id or self.model

    @property
    def mirror_uri(self) -> str | None:
        """As for SyncSettings; an s3 `model_id` implies one too."""
        implied = super().mirror_uri
        if implied is None and self.model_id is not None and self.model_id.startswith("s3://"):
            return self.model_id.rstrip("/") + "/adapters/"
        return implied

    @property
    def lora_enabled(self) -> bool:
        """Whether adapters are served. Looks at the disk when nothing was said."""
        if self.enable_lora is not None:
            return self.enable_lora
        if self.adapters_dir is not None or self.mirror_uri is not None or self.sync:
            return True
        return self.adapters_path is not None and self.adapters_path.is_dir()

    @property
    def rope_factors(self) -> tuple[float, ...]:
        """LONG_LORA_SCALING_FACTORS as numbers, each once, in order."""
        said = (self.long_lora_scaling_factors or "").strip("() ").split(",")
        return tuple(sorted({float(one) for one in said if one.strip()}))

    @property
    def model_name(self) -> str:
        """What the HTTP side knows the model by."""
        if self.served_model_name is not None:
            return self.served_model_name
        path = self.model_dir.absolute().as_posix() if self.model_dir is not None else self.model or ""
        return path.rstrip("/").rpartition("/")[2]

    @property
    def model_names(self) -> tuple[str, ...]:
        """What requests may call the model: its name first, then MODEL's last part and all of it."""
        said = str(self.model)
        return tuple(dict.fromkeys([self.model_name, said.rstrip("/").rpartition("/")[2], said]))

    @property
    def registered_path(self) -> Path | None:
        """The folder of adapters that were registered over HTTP; None without a folder of adapters.

        It is the worker's own, in the cache, since others may fill ADAPTERS_DIR and let nobody else write.
        """
        if self.adapters_path is None:
            return None
        place = hashlib.sha256(str(self.adapters_path.absolute()).encode()).hexdigest()[:8]
        return self.cache_path / "registered" / f"{self.model_name}-{place}" / "adapters"

    @property
    def own_entry_point(self) -> str | None:
        """The custom handler that was named; None when none was, or DJL Serving's own."""
        built_in = self.entry_point is None or _BUILT_IN.fullmatch(self.entry_point)
        return None if built_in else self.entry_point

    @property
    def may_have_handler(self) -> bool:
        """Whether a handler of the model's answers, if there is one."""
        return self.custom_code and (self.entry_point is None or self.own_entry_point is not None)

    @property
    def cpu_loras(self) -> int:
        return self.max_loras if self.max_cpu_loras is None else self.max_cpu_loras

    @property
    def in_flight_rows(self) -> int:
        return 4 * self.max_num_seqs if self.max_in_flight_rows is None else self.max_in_flight_rows

    @property
    def heartbeat_seconds(self) -> float:
        return self.visibility_timeout_seconds / 3

    @property
    def dead_letter_prefix(self) -> str | None:
        """Where dead letters go; None when neither DEAD_LETTER_URI nor OUTPUT_PREFIXES is set."""
        if self.dead_letter_uri is None and self.output_prefixes:
            return self.output_prefixes[0] + "dead-letter/"
        return self.dead_letter_uri

    def require(self, *names: str) -> list[str]:
        """One mistake for each of these settings that a command needs and nobody gave."""
        by_name = {info.name: info for info in describe(Settings)}
        return [
            f"{name}: required, and not set; set {by_name[name].env} or {by_name[name].flag}"
            for name in names
            if getattr(self, name) in {None, ()}
        ]


KNOWN_NAMES = reader.known_names(Settings)
"""Every LORAMILL_ variable of the program, to pass as `known` where only SyncSettings is read."""

_DJL = DjlOptions(describe(Settings))


def read_settings(
    *,
    environ: Mapping[str, str],
    flags: Mapping[str, object] | None = None,
    properties: str | None = None,
    known: Collection[str] = (),
    required: Collection[str] = (),
    together: Collection[str] = (),
    either: Sequence[str] = (),
) -> Settings:
    """Read every setting, or raise SettingsError with every mistake; a `required` one not set is a mistake.

    So it is where one of those that belong `together` is set and another is not, and where none of `either`
    is: then the first of them is asked for.
    `properties` is the text of the model folder's serving.properties when it is at hand: for an s3 model
    read without it first, download the file, and read again. `flags` go by field name, None for not given.
    """
    found = _DJL.read(environ, properties)
    reading = reader.gather(Settings, environ=environ, flags=flags, options=found.options, known=known)
    if reading.values["model"] is None:
        reading.values["model"] = reading.values["model_id"]
    settings = Settings(**reading.values)
    said = {name for name in together if getattr(settings, name) not in {None, ()}} | reading.refused
    missing = () if any(getattr(settings, name) for name in either) else either[:1]
    needed = [*missing, *required, *(() if said.isdisjoint(together) else together)]
    mistakes = found.mistakes + settings.require(*(name for name in needed if name not in reading.refused))
    mistakes += reading.mistakes + _cross_checks(settings, reading)
    if settings.may_have_handler:
        mistakes += refuse_other_calls(handler_options(environ, properties))
    else:
        mistakes += found.strangers
    if mistakes:
        raise SettingsError(mistakes)
    return settings


def handler_options(environ: Mapping[str, str], properties: str | None = None) -> dict[str, str]:
    """Every option that was given, known or not, by its name: what a custom handler is told at first."""
    return _DJL.said(environ, properties)


def notes(
    settings: Settings, properties: str | None = None, environ: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """What was said and has no effect, and what may surprise, for the log at start."""
    said = [
        f"{key} in serving.properties sizes DJL Serving's workers and has no effect here"
        for key in ignored_keys(properties)
        if not (settings.custom_code and key in BATCH_KEYS)
    ]
    if settings.entry_point is not None and settings.own_entry_point is None:
        said.append(
            f"entry_point {settings.entry_point} is DJL Serving's: the worker's engine is in its place"
        )
    if not settings.may_have_handler:
        said += [
            f"option {name} chooses among DJL Serving's ways and changes nothing here"
            for name in handler_options(environ, properties)
            if name in AS_IT_IS
        ]
    if settings.lora_enabled and settings.mirror_uri is not None and not settings.sync:
        said.append(
            f"this worker does not mirror {settings.mirror_uri}: adapters are served as far as "
            f"`loramill sync` brings them to {settings.adapters_path}, or with --sync the worker itself"
        )
    if not settings.lora_enabled and settings.adapters_dir is not None:
        said.append(f"enable_lora is false: the adapters in {settings.adapters_dir} are not served")
    return said


def _cross_checks(settings: Settings, reading: Reading) -> list[str]:
    """Settings that contradict each other. One that was refused by itself is not looked at again."""

    def shown(name: str) -> str:
        return f"{getattr(settings, name)} (from {reading.origins.get(name, 'the default')})"

    cpu_loras, loras = shown("max_cpu_loras"), shown("max_loras")
    tokens, rows = shown("max_num_batched_tokens"), shown("max_num_seqs")
    degree = shown("tensor_parallel_degree")
    checks = [
        (
            {"max_cpu_loras", "max_loras"},
            settings.cpu_loras < settings.max_loras,
            f"max_cpu_loras: {cpu_loras} must be at least max_loras, {loras}",
        ),
        (
            {"max_num_batched_tokens", "max_num_seqs"},
            settings.max_num_batched_tokens < settings.max_num_seqs,
            f"max_num_batched_tokens: {tokens} must be at least max_num_seqs, {rows}",
        ),
        (
            {"adapters_events_queue_url", "queue_url"},
            settings.queue_url is not None and settings.adapters_events_queue_url == settings.queue_url,
            f"adapters_events_queue_url: {shown('adapters_events_queue_url')} must not be queue_url",
        ),
        (
            {"lora_mode", "tensor_parallel_degree"},
            settings.tensor_parallel_degree != 1 and settings.lora_mode != "unmerged",
            f"lora_mode: {shown('lora_mode')} must be unmerged with tensor_parallel_degree {degree}, above 1",
        ),
        (
            {"entry_point", "custom_code"},
            settings.own_entry_point is not None and not settings.custom_code,
            f"entry_point: {shown('entry_point')} is code, which needs LORAMILL_CUSTOM_CODE or --custom-code",
        ),
        (
            {"http_host", "http_token"},
            settings.http_token is None and not _is_loopback(settings.http_host),
            f"http_token: LORAMILL_HTTP_TOKEN or --http-token must be set for http_host {shown('http_host')}",
        ),
    ]
    return [text for names, wrong, text in checks if wrong and reading.refused.isdisjoint(names)]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"
