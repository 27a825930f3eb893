"""What was chosen for the rows of a step, and its way from the device to the host."""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Sample(NamedTuple):
    token: int
    log_prob: float | None
    """Natural logarithm under the model's own distribution, before temperature and cuts."""
    finite: bool
    """False when the row's logits hold NaN or infinities: then the rest means nothing."""
    top_tokens: tuple[tuple[int, float], ...] | None = None
    """The likeliest tokens and their log-probabilities, as many as `top_n_tokens` says."""


class Told(NamedTuple):
    """Rows that want log-probabilities."""

    rows: torch.Tensor
    """int64 [rows concerned]: where they stand in the batch."""
    numbers: tuple[int, ...]
    """The same, for the host."""
    top_n: tuple[int, ...]
    """How many alternatives each of them wants."""


class Sampled(NamedTuple):
    """What was chosen: tensors on the device of the logits, or after `fetch` on the host."""

    tokens: torch.Tensor
    """int64 [rows]."""
    finite: torch.Tensor
    """bool [rows]."""
    log_probs: torch.Tensor | None
    """float32 [rows that want one, in order]."""
    top_tokens: torch.Tensor | None
    """int64 [rows that want log-probabilities, 20]; None if no row wants alternatives."""
    top_log_probs: torch.Tensor | None
    """float32, likewise."""
    told: Told | None
    arrived: torch.cuda.Event | None = None
    """When this has happened a copy that is under way is complete."""


def in_one(parts: Sequence[tuple[torch.Tensor, Sequence[int], Sampled]]) -> Sampled:
    """What was chosen for the rows of a step, from parts of them.

    Each part comes with where its rows stand, on the device and on the host.
    """
    order = torch.cat([places for places, _, _ in parts])
    found = torch.cat([sampled.tokens for _, _, sampled in parts])
    sound = torch.cat([sampled.finite for _, _, sampled in parts])
    tokens = torch.empty_like(found).index_copy_(0, order, found)
    finite = torch.empty_like(sound).index_copy_(0, order, sound)
    told = [(places, rows, sampled) for places, rows, sampled in parts if sampled.told is not None]
    if not told:
        return Sampled(tokens, finite, None, None, None, None)
    log_probs, numbers, top_n = list[torch.Tensor](), list[int](), list[int]()
    for _, rows, sampled in told:
        assert sampled.told is not None
        assert sampled.log_probs is not None
        log_probs.append(sampled.log_probs)
        numbers += [rows[number] for number in sampled.told.numbers]
        top_n += sampled.told.top_n
    width = max(sampled.top_tokens.shape[1] if sampled.top_tokens is not None else 0 for *_, sampled in told)
    top_tokens = top_log_probs = None
    if width:
        likely = [_likely(sampled, width) for *_, sampled in told]
        top_tokens = torch.cat([tokens for tokens, _ in likely])
        top_log_probs = torch.cat([own for _, own in likely])
    # Where the rows that are told of stand has been used: what is left to do is the host's.
    whole = Told(torch.empty(0, dtype=torch.int64), tuple(numbers), tuple(top_n))
    return Sampled(tokens, finite, torch.cat(log_probs), top_tokens, top_log_probs, whole)


def _likely(sampled: Sampled, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest tokens and how likely they are, [rows, width]; where nobody asked for any, zeros."""
    assert sampled.log_probs is not None
    if sampled.top_tokens is None or sampled.top_log_probs is None:
        none = sampled.log_probs.new_zeros((len(sampled.log_probs), width))
        return none.to(torch.int64), none
    missing = (0, width - sampled.top_tokens.shape[1])
    pad = torch.nn.functional.pad
    return pad(sampled.top_tokens, missing), pad(sampled.top_log_probs, missing)


def fetch(sampled: Sampled) -> Sampled:
    """Start the copy to the host, on the current stream; call it before more work is put there."""
    if not sampled.tokens.is_cuda:
        return sampled
    found = (
        one.to("cpu", non_blocking=True) if isinstance(one, torch.Tensor) else None for one in sampled[:5]
    )
    tokens, finite, log_probs, top_tokens, top_log_probs = found
    assert tokens is not None
    assert finite is not None
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()
    return Sampled(tokens, finite, log_probs, top_tokens, top_log_probs, sampled.told, arrived)


def collect(sampled: Sampled) -> list[Sample]:
    """A sample for each row, in order.

    Waits for what it needs; if that was fetched before, for nothing that was put on the stream since.
    """
    sampled = fetch(sampled)
    if sampled.arrived is not None:
        sampled.arrived.synchronize()
    tokens, finite = sampled.tokens.tolist(), sampled.finite.tolist()
    samples = [Sample(token, None, sound) for token, sound in zip(tokens, finite, strict=True)]
    told = sampled.told
    if told is not None and sampled.log_probs is not None:
        for row, log_prob in zip(told.numbers, sampled.log_probs.tolist(), strict=True):
            samples[row] = samples[row]._replace(log_prob=log_prob)
    if told is not None and sampled.top_tokens is not None and sampled.top_log_probs is not None:
        likely = zip(sampled.top_tokens.tolist(), sampled.top_log_probs.tolist(), strict=True)
        for row, top_n, (ids, log_probs) in zip(told.numbers, told.top_n, likely, strict=True):
            if top_n:
                top_tokens = tuple(zip(ids[:top_n], log_probs[:top_n], strict=True))
                samples[row] = samples[row]._replace(top_tokens=top_tokens)
    return samples
