"""A request while the engine works on it. No torch here."""

import enum

from worker.jobs import FinishReason, InferenceRequest


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """One row's state from admission to finish.

    Only the scheduler, and what it is made of, changes it; only `append` adds tokens.
    """

    __slots__ = (
        "arrival",
        "blocks",
        "computed",
        "finish_reason",
        "log_probs",
        "passed_over",
        "pending",
        "prompt_log_probs",
        "proven",
        "request",
        "slot",
        "started",
        "status",
        "text_end",
        "tokens",
        "top_tokens",
        "written",
    )

    def __init__(self, request: InferenceRequest) -> None:
        self.request = request
        self.tokens: list[int] = list(request.prompt)
        """Prompt and generated token ids."""
        self.log_probs: list[float] = []
        """One for each generated token, where the request asked for details."""
        self.top_tokens: list[tuple[tuple[int, float], ...]] = []
        """For each generated token those that were likeliest, where the request asked for some."""
        self.prompt_log_probs: list[float | None] = [None]
        """Of the prompt's tokens, as far as they are known, where the request asked for them."""
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
        """Younger rows that started while it waited after a preemption."""
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
    def ends_with_pending(self) -> bool:
        """Whether its pending token is the last that it may have."""
        return self.pending and self.num_generated + 1 >= self.request.params.max_new_tokens

    @property
    def may_reuse(self) -> bool:
        """Whether it can do without the logits of its prompt."""
        return not self.request.params.prompt_log_probs

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
