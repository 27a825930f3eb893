"""Logits -> tokens, for all rows of a step at once, in three parts that need not wait for each other.

`prepare` says on the host what is to be done, before the logits are there; `choose` does it on the device
and never waits for it; `collect` waits and brings the tokens to the host. In between, the next step may
begin: its `prepare` is told which rows have a token that the host does not know yet, its `choose` gets those
tokens as a tensor. A row's choice depends on its own logits, parameters, seed and step alone, never on its
neighbours.

What happens to a row: `logit_changes` for all rows, then the likeliest token, or with `do_sample` `draws`.
Log-probabilities are the model's own, before all that: `log_probs`.
"""

from collections.abc import Collection
from collections.abc import Sequence as SequenceOf
from typing import Any, NamedTuple, TypeVar

import torch

from worker.engine.draws import Draws, draw, likeliest, plan_draws
from worker.engine.log_probs import likely_tokens, token_log_probs
from worker.engine.logit_changes import (
    Allowed,
    Changes,
    change,
    changes_logits,
    ending_tokens,
    plan_allowed,
    plan_changes,
    restrict,
)
from worker.engine.samples import Sample, Sampled, Told, collect, fetch, in_one
from worker.engine.sequence import Sequence
from worker.engine.transfer import to_device
from worker.errors import InvalidParameters
from worker.jobs import MAX_TOP_N_TOKENS, SamplingParams

__all__ = [
    "Group",
    "Sample",
    "Sampled",
    "SamplingPlan",
    "check",
    "choose",
    "choose_in_groups",
    "collect",
    "fetch",
    "prepare",
]


class SamplingPlan(NamedTuple):
    """What to do with the logits of a step. Made by `prepare`, for one `choose`."""

    changes: Changes | None = None
    allowed: Allowed | None = None
    draws: tuple[Draws, ...] = ()
    told: Told | None = None


_GREEDY = SamplingPlan()


def check(
    params: SamplingParams,
    vocab_size: int,
    eos_token_ids: Collection[int],
    whose: str = "the base model",
) -> None:
    """Raise InvalidParameters for tokens that a model of `vocab_size` tokens cannot write; it is `whose`."""
    named = {
        "logit_bias": [token for token, _ in params.logit_bias],
        "allowed_token_ids": params.allowed_token_ids,
        "stop_token_ids": params.stop_token_ids,
    }
    for name, tokens in named.items():
        if tokens and max(tokens) >= vocab_size:
            raise InvalidParameters(
                f"parameter {name} has token {max(tokens)}; {whose} has {vocab_size} tokens"
            )
    endings = ending_tokens(params, eos_token_ids)
    if params.min_new_tokens and params.allowed_token_ids and endings.issuperset(params.allowed_token_ids):
        raise InvalidParameters(
            f"parameter min_new_tokens is {params.min_new_tokens}, and every one of allowed_token_ids would "
            "end the row before"
        )


def prepare(
    sequences: SequenceOf[Sequence],
    vocab_size: int,
    device: torch.device,
    *,
    eos_token_ids: Collection[int] = (),
    pending: SequenceOf[int] | None = None,
) -> SamplingPlan:
    """Plan the next token of each of `sequences`, whose logits will have `vocab_size` columns.

    `pending` has 1 for a row whose last token was chosen on the device and is not among the sequence's tokens
    yet, else 0; None is 0 for all. The sequences' parameters must have passed `check`. Changes nothing. On
    CUDA the plan is on its way when this returns: use it on the stream that is current now.
    """
    if all(_is_plain(sequence.request.params) for sequence in sequences):
        return _GREEDY
    pending = [0] * len(sequences) if pending is None else pending
    plan = SamplingPlan(
        changes=plan_changes(sequences, pending, vocab_size, eos_token_ids),
        allowed=plan_allowed(sequences),
        draws=plan_draws(sequences, pending, vocab_size, device),
        told=_plan_told(sequences),
    )
    return plan if device.type == "cpu" else _send(plan, device)


def choose(logits: torch.Tensor, plan: SamplingPlan, latest: torch.Tensor | None = None) -> Sampled:
    """Choose a token for each row of `logits` [rows, vocabulary], of any floating type; they are not changed.

    `latest` int64 [rows], on the same device, has the tokens that were pending when the plan was made, and
    any token or -1 for other rows; it is needed where a pending row has a penalty. Nothing here waits for the
    device, and all shapes follow from the plan. Where a row changes its logits, all are copied in float32.
    """
    # One pass, where isfinite().all() takes several. A sum beyond float32's range is no sound row either.
    finite = logits.sum(-1, dtype=torch.float32).isfinite()
    scores = logits
    if plan.changes is not None or plan.allowed is not None:
        scores = logits.to(torch.float32, copy=True)
        if plan.allowed is not None:
            restrict(scores, plan.allowed)
        if plan.changes is not None:
            change(scores, plan.changes, latest)
    if sum(len(draws.rows) for draws in plan.draws) < len(logits):
        tokens = likeliest(scores)
    else:
        tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for draws in plan.draws:
        tokens.index_copy_(0, draws.rows, draw(scores, draws))
    if plan.told is None:
        return Sampled(tokens, finite, None, None, None, None)
    own, chosen = logits, tokens
    if len(plan.told.numbers) < len(logits):
        own, chosen = own.index_select(0, plan.told.rows), chosen.index_select(0, plan.told.rows)
    top_tokens, top_log_probs = None, None
    if any(plan.told.top_n):
        # Always as many, so that a row's neighbours cannot change which of equals it gets.
        top_tokens, top_log_probs = likely_tokens(own, min(MAX_TOP_N_TOKENS, own.shape[1]))
    return Sampled(tokens, finite, token_log_probs(own, chosen), top_tokens, top_log_probs, plan.told)


class Group(NamedTuple):
    """Rows of a step that can write equally many tokens."""

    width: int
    rows: SequenceOf[int]
    """Where they stand in the batch."""
    plan: SamplingPlan


def choose_in_groups(
    logits: torch.Tensor, groups: SequenceOf[Group], latest: torch.Tensor | None = None
) -> Sampled:
    """As `choose`, for rows of which some have columns that others do not; each row is in one group."""
    if len(groups) == 1 and groups[0].width == logits.shape[1]:
        return choose(logits, groups[0].plan, latest)
    chosen = []
    for width, rows, plan in groups:
        places = to_device(torch.tensor(rows), logits.device)
        own = logits.index_select(0, places)[:, :width].contiguous()
        chosen.append(
            (places, rows, choose(own, plan, None if latest is None else latest.index_select(0, places)))
        )
    return in_one(chosen)


def _is_plain(params: SamplingParams) -> bool:
    """Whether a row takes the likeliest token, and nobody asks how likely it was."""
    return not (params.do_sample or params.details or params.top_n_tokens or changes_logits(params))


def _plan_told(sequences: SequenceOf[Sequence]) -> Told | None:
    params = [sequence.request.params for sequence in sequences]
    rows = tuple(row for row, own in enumerate(params) if own.details or own.top_n_tokens)
    if not rows:
        return None
    return Told(torch.tensor(rows), rows, tuple(params[row].top_n_tokens for row in rows))


_Part = TypeVar("_Part", Changes, Allowed, Draws, Told)


def _send(plan: SamplingPlan, device: torch.device) -> SamplingPlan:
    """The plan with its tensors on `device`, by one copy for each of their types."""
    parts = (plan.changes, plan.allowed, *plan.draws, plan.told)
    found = [one for part in parts if part is not None for one in part if isinstance(one, torch.Tensor)]
    arrived = {}
    for dtype in {one.dtype for one in found}:
        alike = [one for one in found if one.dtype == dtype]
        packed = to_device(torch.cat(alike), device)
        arrived[dtype] = iter(torch.split(packed, [len(one) for one in alike]))

    def sent(part: _Part) -> _Part:
        own = {name: one for name, one in part._asdict().items() if isinstance(one, torch.Tensor)}
        fields: dict[str, Any] = {name: next(arrived[one.dtype]) for name, one in own.items()}
        return part._replace(**fields)

    return SamplingPlan(
        changes=None if plan.changes is None else sent(plan.changes),
        allowed=None if plan.allowed is None else sent(plan.allowed),
        draws=tuple(sent(draws) for draws in plan.draws),
        told=None if plan.told is None else sent(plan.told),
    )
