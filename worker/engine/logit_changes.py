"""What a row's parameters do to its logits before a token is chosen, for greedy and drawn rows alike.

In this order:

1. `allowed_token_ids`, as in vLLM: every other token is out.
2. `logit_bias`, as in OpenAI's API: added to the logits.
3. `repetition_penalty`, as in transformers (CTRL, arXiv:1909.05858): the logit of a token in the prompt or
   among the generated ones is divided by it, or multiplied when it is negative; once, however often it came.
4. `frequency_penalty` and `presence_penalty`, as in OpenAI's API and vLLM: a generated token's logit loses
   the one as often as it was generated, and the other once. The prompt does not count.
5. `min_new_tokens`, as in transformers and vLLM: until then every token is out that would end the row.
"""

from array import array
from collections import Counter
from collections.abc import Collection
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch

from worker.engine.sequence import Sequence
from worker.jobs import SamplingParams


class Changes(NamedTuple):
    """One entry for each (row, token) that is changed. Entries of the same row and token say the same."""

    rows: torch.Tensor
    """int64 [entries]."""
    tokens: torch.Tensor
    """int64 [entries]."""
    counts: torch.Tensor
    """int64 [entries]: how often the token was generated; 0 is in the prompt only, -1 nowhere so far."""
    biases: torch.Tensor
    """float32 [entries]; minus infinity forbids the token."""
    repetition: torch.Tensor
    """float32 [rows], as are the next two."""
    frequency: torch.Tensor
    presence: torch.Tensor
    pending: torch.Tensor
    """int64 [rows]: 1 where a token has been chosen that is not among `tokens` yet, else 0."""
    needs_latest: bool


class Allowed(NamedTuple):
    """The only tokens that some rows may take."""

    rows: torch.Tensor
    """int64 [rows concerned]."""
    entry_rows: torch.Tensor
    """int64 [entries]."""
    entry_tokens: torch.Tensor
    """int64 [entries]."""


def changes_logits(params: SamplingParams) -> bool:
    """Whether a row with these parameters may need Changes or Allowed."""
    return bool(
        params.repetition_penalty != 1.0
        or params.frequency_penalty
        or params.presence_penalty
        or params.logit_bias
        or params.allowed_token_ids
        or params.min_new_tokens
    )


def ending_tokens(params: SamplingParams, eos_token_ids: Collection[int]) -> set[int]:
    """Tokens that would end the row."""
    return {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}


def plan_changes(
    sequences: SequenceOf[Sequence],
    pending: SequenceOf[int],
    vocab_size: int,
    eos_token_ids: Collection[int],
) -> Changes | None:
    """The changes for these rows, on the host; None when there are none. See `sampler.prepare`."""
    rows, tokens, counts, biases = array("q"), array("q"), array("q"), array("f")
    needs_latest = False
    for row, sequence in enumerate(sequences):
        params = sequence.request.params
        if not changes_logits(params):
            continue
        needs_latest |= bool(pending[row]) and _is_penalized(params)
        bias = dict(params.logit_bias)
        if sequence.num_generated + pending[row] < params.min_new_tokens:
            bias |= dict.fromkeys(ending_tokens(params, {*eos_token_ids, *sequence.endings}), float("-inf"))
        before = len(tokens)
        if bias or params.frequency_penalty or params.presence_penalty:
            seen = _seen(sequence, params)
            seen |= {token: -1 for token in bias if token not in seen}
            tokens.extend(seen)
            counts.extend(seen.values())
            biases.extend([bias.get(token, 0.0) for token in seen])
        elif params.repetition_penalty != 1.0:
            tokens.extend(sequence.tokens)  # repeated ones as they are, which takes a sixth of the time
            counts.extend(array("q", [0]) * len(sequence.tokens))
            biases.extend(array("f", [0.0]) * len(sequence.tokens))
        rows.extend(array("q", [row]) * (len(tokens) - before))
    if not rows and not needs_latest:
        return None
    own = [sequence.request.params for sequence in sequences]
    changes = Changes(
        rows=_tensor(rows, torch.int64),
        tokens=_tensor(tokens, torch.int64),
        counts=_tensor(counts, torch.int64),
        biases=_tensor(biases, torch.float32),
        repetition=_tensor(array("f", [params.repetition_penalty for params in own]), torch.float32),
        frequency=_tensor(array("f", [params.frequency_penalty for params in own]), torch.float32),
        presence=_tensor(array("f", [params.presence_penalty for params in own]), torch.float32),
        pending=torch.tensor(pending, dtype=torch.int64),
        needs_latest=needs_latest,
    )
    known = changes.tokens < vocab_size  # some models read more tokens than they can write
    if not known.all():
        entries = {name: getattr(changes, name)[known] for name in ("rows", "tokens", "counts", "biases")}
        changes = changes._replace(**entries)
    return changes


def plan_allowed(sequences: SequenceOf[Sequence]) -> Allowed | None:
    """The rows that may take some tokens only, on the host; None when there are none."""
    lists = {row: own.request.params.allowed_token_ids for row, own in enumerate(sequences)}
    lists = {row: tokens for row, tokens in lists.items() if tokens}
    if not lists:
        return None
    return Allowed(
        rows=torch.tensor(list(lists)),
        entry_rows=torch.tensor([row for row, tokens in lists.items() for _ in tokens]),
        entry_tokens=torch.tensor([token for tokens in lists.values() for token in tokens]),
    )


def restrict(scores: torch.Tensor, allowed: Allowed) -> None:
    """Set what is not allowed to minus infinity. Changes `scores`, float32 [rows, vocabulary]."""
    entries = (allowed.entry_rows, allowed.entry_tokens)
    kept = scores[entries]
    scores.index_fill_(0, allowed.rows, -torch.inf)
    scores.index_put_(entries, kept)


def change(scores: torch.Tensor, changes: Changes, latest: torch.Tensor | None) -> None:
    """Apply `changes`, with the tokens `latest` int64 [rows] counted as generated where they are pending.

    Changes `scores`, float32 [rows, vocabulary]. Never waits for the device.
    """
    rows, tokens, counts, biases = changes[:4]
    if changes.needs_latest:
        assert latest is not None, "the plan was made before the newest tokens were known"
        rows, tokens, counts, biases = _with_latest(changes, latest.clamp(min=0))
    own = scores[rows, tokens] + biases
    repetition = torch.where(counts >= 0, changes.repetition[rows], 1.0)
    own = torch.where(own < 0, own * repetition, own / repetition)
    own = own - changes.frequency[rows] * counts.clamp(min=0) - changes.presence[rows] * (counts > 0)
    scores.index_put_((rows, tokens), own)


def _with_latest(changes: Changes, latest: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The entries, and one more for each row's latest token.

    Where that token has an entry already both say the same, so that it does not matter which is written.
    """
    rows, tokens, counts, biases = changes[:4]
    same = tokens == latest[rows]
    found = torch.full_like(latest, -1).scatter_reduce_(0, rows, torch.where(same, counts, -1), "amax")
    # Of the entries that are the same, as many as there are, a row with biases has one at most.
    bias = biases.new_zeros(len(latest)).index_add_(0, rows, torch.where(same, biases, 0.0))
    found = torch.where(changes.pending > 0, found.clamp(min=0) + 1, found)
    return (
        torch.cat((rows, torch.arange(len(latest), device=rows.device))),
        torch.cat((tokens, latest)),
        torch.cat((torch.where(same, found[rows], counts), found)),
        torch.cat((biases, bias)),
    )


def _is_penalized(params: SamplingParams) -> bool:
    return bool(params.repetition_penalty != 1.0 or params.frequency_penalty or params.presence_penalty)


def _seen(sequence: Sequence, params: SamplingParams) -> dict[int, int]:
    """How often each token was generated, as far as the penalties ask."""
    seen: dict[int, int] = dict.fromkeys(sequence.tokens, 0) if params.repetition_penalty != 1.0 else {}
    if params.frequency_penalty or params.presence_penalty:
        seen |= Counter(sequence.generated)
    return seen


def _tensor(numbers: "array[int] | array[float]", dtype: torch.dtype) -> torch.Tensor:
    # From a buffer: four times as fast as from a list.
    return torch.frombuffer(numbers, dtype=dtype) if numbers else torch.empty(0, dtype=dtype)
