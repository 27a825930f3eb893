"""A request while the engine works on it. No torch here."""

import enum

from worker.jobs import FinishReason, InferenceRequest


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """One row's state from admission to finish.

    Only the scheduler moves `status`, `blocks`, `slot` and `computed`; only `append` adds tokens.
    """

    __slots__ = (
        "blocks",
        "computed",
        "finish_reason",
        "log_probs",
        "passed_over",
        "request",
        "slot",
        "status",
        "text_end",
        "tokens",
    )

    def __init__(self, request: InferenceRequest) -> None:
        self.request = request
        self.tokens: list[int] = list(request.prompt)
        """Prompt and generated token ids."""
        self.log_probs: list[float] = []
        """One for each generated token, where the request asked for details."""
        self.status = Status.WAITING
        self.finish_reason: FinishReason | None = None
        self.computed = 0
        """How many of `tokens` have their keys and values in the cache."""
        self.blocks: list[int] = []
        self.slot: int | None = None
        """LoRA slot; None for the base model, or while waiting."""
        self.passed_over = 0
        """Rows admitted ahead of this one since it came to the head of the queue."""
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
        return len(self.tokens) - self.computed

    def append(self, token: int, log_prob: float | None) -> None:
        self.tokens.append(token)
        if log_prob is not None:
            self.log_probs.append(log_prob)

    def __repr__(self) -> str:
        return (
            f"<Sequence {self.request.id} {self.status.value} {self.computed}/{len(self.tokens)} tokens, "
            f"slot {self.slot}, blocks {self.blocks}>"
        )
