"""The nouns of loramill: what travels from a queue message to a result line.

All are frozen. Times are seconds since the Unix epoch unless a name says otherwise.
"""

import enum
from collections.abc import Callable, Collection, Mapping
from typing import Any

import msgspec


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """One receive of one SQS message. A message received twice is two deliveries."""

    message_id: str
    body: str
    receipt: str
    receive_count: int = 1
    sent_at: float = 0.0
    attributes: dict[str, str] = {}
    """Message attributes of type String or Number, as text."""
    group_id: str | None = None
    """MessageGroupId, the tenant of a fair queue."""


MAX_TOP_N_TOKENS = 20


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How one row is decoded. Field names and meaning are those of DJL, TGI and transformers, or of vLLM."""

    max_new_tokens: int = 30
    min_new_tokens: int = 0
    """Until there are so many, no token that would end the row, and no stop sequence counts."""
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    top_p: float = 1.0
    min_p: float = 0.0
    """Least probability of a token, as a share of the likeliest one's."""
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    """Over prompt and generated tokens; the next two over generated ones alone."""
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, each once, and what is added to their logits."""
    allowed_token_ids: tuple[int, ...] = ()
    """No token but these; empty allows all."""
    seed: int | None = None
    """None derives a seed from the request's id, so that a retry repeats the text."""
    stop_sequences: tuple[str, ...] = ()
    """Generation ends before the first of these; the text that is returned excludes it."""
    stop_token_ids: tuple[int, ...] = ()
    """Generation ends with any of these; the text that is returned excludes it."""
    ignore_eos: bool = False
    details: bool = False
    """Log-probabilities of the generated tokens."""
    top_n_tokens: int = 0
    """The likeliest tokens in the place of each generated one, up to MAX_TOP_N_TOKENS."""
    prompt_log_probs: bool = False
    """Log-probabilities of the prompt's tokens but the first."""
    return_full_text: bool = False


class FinishReason(enum.StrEnum):
    EOS_TOKEN = "eos_token"
    STOP_SEQUENCE = "stop_sequence"
    LENGTH = "length"
    ERROR = "error"


class Failure(msgspec.Struct, frozen=True):
    """The `error` object of a result line or a manifest."""

    code: str
    message: str
    retryable: bool = False


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: str
    content: str


class Task(enum.StrEnum):
    GENERATE = "generate"
    SCORE = "score"


class Given(msgspec.Struct, frozen=True, kw_only=True):
    """What a job says about a row outside the row."""

    adapter: object = None
    """For a row that names none itself; text, or the row is refused."""
    override: str | None = None
    """Wins over the row's own adapter; "" is the base model."""
    parameters: object = None
    """Those that the row has no own value for; an object, or the row is refused."""
    task: Task = Task.GENERATE
    workflow: str | None = None
    """What rows are put through."""
    base_models: Collection[str] | None = None
    """Names of the base model; None where they are not known: then whatever can be no adapter's is one."""
    keeps_raw: bool = False
    """Whether native rows are kept as they were sent, too."""


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """What a line in the shape of a row of another format needs from that row."""

    format: str
    """`openai` or `bedrock`."""
    shape: str | None = None
    """Which of the format's answers is expected: see `wire.openai_rows`, `wire.bedrock_rows`. None if the row
    failed before that was known."""
    model: str | None = None
    """OpenAI's `body.model`, as it was written."""
    body: bytes = b""
    """Bedrock's `modelInput`, as JSON."""


class Raw(msgspec.Struct, frozen=True):
    """A native row as it was sent, for an input formatter; it may be one that cannot be read without."""

    item: dict[str, Any]
    parameters: object = None
    """Those of the job, which the row's own win over."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One input of a job. Exactly one of `text`, `tokens`, `messages` and `failure` is set.

    A row that could not be read carries its `failure` to the result line it becomes.
    """

    index: int
    id: str
    text: str | None = None
    tokens: tuple[int, ...] | None = None
    messages: tuple[ChatMessage, ...] | None = None
    task: Task = Task.GENERATE
    target: str | tuple[int, ...] | None = None
    """What is scored after the input, of its kind; None, where `task` says score, is the input itself."""
    adapter: str | None = None
    """None is the base model."""
    workflow: str | None = None
    """What the row is put through instead; then it has no adapter of its own."""
    params: SamplingParams = SamplingParams()
    said: Mapping[str, Any] = {}
    """Of a native row, the parameters that it or its job said, as they did."""
    fills: bool = False
    """Generate as long as `max_model_len` allows, whatever `params.max_new_tokens` says."""
    origin: Origin | None = None
    """None is a native row."""
    raw: Raw | None = None
    """Kept where formatters may be for the row. With `failure`, it may become a row all the same."""
    failure: Failure | None = None


class Output(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where results go: `uri` is an `s3://bucket/prefix/` with a trailing slash."""

    uri: str
    format: str = "native"


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """An object whose lines are rows: those that begin in its bytes `start` to `stop`."""

    uri: str
    etag: str | None = None
    """Of the version that is meant; None is whatever is there."""
    format: str = "auto"
    """Of the rows: `native`, `openai`, `bedrock`, or `auto`, which looks at each."""
    start: int = 0
    """Where the object is packed, bytes of what it holds; so is `stop`."""
    stop: int | None = None
    """None is the end."""

    @property
    def is_packed(self) -> bool:
        return self.uri.endswith(".gz")


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Which rows of a job are run together: each part has a message and a file of results of its own."""

    number: int = 0
    count: int = 1
    first_row: int = 0
    """Index of its first row in the job."""
    rows: int


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A decoded job message: its rows, or the source that they are in."""

    id: str
    rows: tuple[Row, ...] = ()
    source: Source | None = None
    part: Part | None = None
    """None where it is all of the rows; those of `source` are counted first."""
    given: Given = Given()
    """For the rows of `source`."""
    output: Output
    digest: str
    """sha256 of what was asked for, so that an id used twice for different work is noticed."""
    created_at: float
    expires_at: float | None = None
    metadata: dict[str, str] = {}

    @property
    def num_rows(self) -> int:
        """How many rows this message is about; 0 while nobody knows."""
        return len(self.rows) if self.part is None else self.part.rows

    @property
    def place(self) -> tuple[int, int]:
        """The number of its part, from 0, and of how many."""
        return (0, 1) if self.part is None else (self.part.number, self.part.count)


class AdapterKey(msgspec.Struct, frozen=True, order=True):
    """An adapter's identity: its name and the digest of its content. Caches are keyed by both."""

    name: str
    version: str


class InferenceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One row as the engine sees it."""

    id: str
    """Unique among the requests in flight."""
    prompt: tuple[int, ...]
    """Token ids; at least one."""
    adapter: AdapterKey | None = None
    params: SamplingParams = SamplingParams()
    fills: bool = False
    """Fewer tokens than `max_new_tokens` will do, where the adapter allows no more."""
    targets: tuple[int, ...] = ()
    """Tokens whose log-probability is all that is wanted: the i-th of n after all of `prompt` but the last
    n - 1 - i tokens. Then `max_new_tokens` is 0, and `prompt` has as many tokens or more."""
    interactive: bool = False
    """Whether somebody waits for it: it goes before rows of the queue."""
    streams: bool = False
    """Whether every token is told of as soon as it is there."""


class Score(msgspec.Struct, frozen=True):
    """How likely a model finds tokens that it was given."""

    log_probs: tuple[float, ...]
    """Natural logarithms under the model's own distribution, one for each token given all before it."""
    is_greedy: bool
    """Whether each of them is the likeliest in its place."""


class TokenDetail(msgspec.Struct, frozen=True):
    id: int
    text: str
    log_prob: float | None
    """Natural logarithm under the model's own distribution; None for a prompt's first token."""


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine made of one InferenceRequest."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    """Generated tokens, the EOS and the tokens of a stop sequence included."""
    finish_reason: FinishReason
    prompt_tokens: int
    log_probs: tuple[float, ...] | None = None
    """Natural logarithms, one for each of `token_ids`; None unless `details` was asked for."""
    top_tokens: tuple[tuple[tuple[int, float], ...], ...] | None = None
    """For each of `token_ids` the `top_n_tokens` likeliest in its place, best first, and their logarithms."""
    prompt_log_probs: tuple[float | None, ...] | None = None
    """One for each token of the prompt, given those before it: None for the first; None unless asked for."""
    score: Score | None = None
    """Of the request's `targets`; None if it had none, or failed."""
    failure: Failure | None = None


class Delta(msgspec.Struct, frozen=True):
    """A token that a request which `streams` has generated; the last one comes with the completion."""

    request_id: str
    token: int
    log_prob: float | None
    """As in Completion."""
    text: str
    """What is certain of the text now and was not before: the texts of all deltas are how it begins."""


OnDelta = Callable[[Delta], None]
"""Who is told of them, on the event loop."""


class RowResult(msgspec.Struct, frozen=True, kw_only=True):
    """One row's outcome, ready to become a result line."""

    row: Row
    adapter_version: str | None = None
    text: str | None = None
    finish_reason: FinishReason = FinishReason.ERROR
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tokens: tuple[TokenDetail, ...] | None = None
    """Generated ones, or those that were scored, when the row asked for `details`."""
    top_tokens: tuple[tuple[TokenDetail, ...], ...] | None = None
    """Alternatives in the place of each of `tokens`, when the row asked for `top_n_tokens`."""
    prefill: tuple[TokenDetail, ...] | None = None
    """The tokens of the prompt, when the row asked for `prompt_log_probs`."""
    score: Score | None = None
    """Set when the row's task was that, and it did not fail."""
    response: dict[str, Any] | None = None
    """What an output formatter made of it; then `text` is its `generated_text`, or all of it as JSON."""
    failure: Failure | None = None
