"""What was chosen for the rows of a step, and its way from the device to the host."""

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
