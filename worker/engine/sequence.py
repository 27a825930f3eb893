"""A request while the engine works on it. No torch here."""

import enum
from typing import NamedTuple

from worker.jobs import FinishReason, InferenceRequest


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Scored(NamedTuple):
    """What the model thinks of a token in its place."""

    log_prob: float
    likeliest: bool


class Sequence:
    """One row's state from admission to finish.

    Only the scheduler, and what it is made of, changes it; only `append` adds tokens.
    """

    __slots__ = (
        "arrival",
        "blocks",
        "computed",
        "endings",
        "finish_reason",
        "log_probs",
        "passed_over",
        "pending",
        "proven",
        "request",
        "scores",
        "slot",
        "started",
        "status",
        "targets",
        "text_end",
        "tokens",
        "top_tokens",
        "written",
    )

    def __init__(self, request: InferenceRequest, endings: frozenset[int] = frozenset()) -> None:
        self.request = request
        self.endings = endings
        """What its adapter ends it with, beside the base model's EOS tokens."""
        self.tokens: list[int] = list(request.prompt)
        """Prompt and generated token ids."""
        self.log_probs: list[float] = []
        """One for each generated token, where the request asked for details."""
        self.top_tokens: list[tuple[tuple[int, float], ...]] = []
        """For each generated token those that were likeliest, where the request asked for some."""
        self.targets = request.prompt[1:] if request.params.prompt_log_probs else request.targets
        """Tokens that it was given and whose log-probabilities were asked for; see `first_scored`."""
        self.scores: list[Scored] = []
        """What is known of `targets`, from the first on."""
        self.status = Status.WAITING
        self.finish_reason: FinishReason | None = None
        self.computed = 0
        """How many of `tokens` have their keys and values in the cache."""
        self.proven = 0
        """How many of those are known to be finite: logits that depend on them were, or others reuse them."""
        self.written = 0
        """How many of its places the model may have written to; at least `computed`."""
        self.pending = False
        """Whether its newest token was chosen on the device and is not among `tokens` yet."""
        self.blocks: list[int] = []
        self.slot: int | None = None
        """LoRA slot; None for the base model, or while waiting."""
        self.arrival = -1
        """Its number in the order in which rows came."""
        self.started = False
        """Whether it has ever run."""
        self.passed_over = 0
        """Younger rows that started while it waited: after a preemption, or as an interactive row."""
        self.text_end: int | None = None
        """Where a stop sequence cuts the generated text, in characters."""

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def generated(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    @property
    def remaining(self) -> int:
        """Tokens still to be put through the model before the next one can be sampled."""
        return len(self.tokens) + self.pending - self.computed

    @property
    def generates(self) -> bool:
        """Whether its prompt is to be gone on with; else it ends when that is computed."""
        return not self.request.targets

    @property
    def only_settles(self) -> bool:
        """Whether nothing more of it goes through the model: its last step has only to be settled."""
        if not self.generates:
            return self.remaining == 0
        return self.pending and self.num_generated + 1 >= self.request.params.max_new_tokens

    @property
    def first_scored(self) -> int:
        """The position whose logits say how likely the first of `targets` is; the others follow it."""
        return 0 if self.generates else len(self.request.prompt) - len(self.request.targets)

    @property
    def num_reusable(self) -> int:
        """How many of its first tokens need not be computed if somebody else has: no logits are needed there.

        Those of its last token always are, and those that tell of targets which have no score yet.
        """
        if len(self.scores) < len(self.targets):
            return self.first_scored + len(self.scores)
        return len(self.tokens) - 1

    def append(
        self, token: int, log_prob: float | None, top_tokens: tuple[tuple[int, float], ...] | None = None
    ) -> None:
        self.tokens.append(token)
        if log_prob is not None:
            self.log_probs.append(log_prob)
        if top_tokens is not None:
            self.top_tokens.append(top_tokens)

    def __repr__(self) -> str:
        return (
            f"<Sequence {self.request.id} {self.status.value} {self.computed}/{len(self.tokens)} tokens, "
            f"slot {self.slot}, blocks {self.blocks}>"
        )
