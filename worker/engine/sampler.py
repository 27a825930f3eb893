"""Logits -> tokens, for all rows of a step at once.

A row's choice depends on its own logits, parameters, seed and step alone, never on its neighbours.
"""

import hashlib
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch

from worker.engine.sequence import Sequence
from worker.jobs import SamplingParams


class Sample(NamedTuple):
    token: int
    log_prob: float | None
    """Natural logarithm under the model's own distribution, before temperature and cuts."""
    finite: bool
    """False when the row's logits hold NaN or infinities: then `token` means nothing."""


def sample(logits: torch.Tensor, sequences: SequenceOf[Sequence]) -> list[Sample]:
    """Choose a token for each row of `logits` [rows, vocabulary]; any floating type."""
    logits = logits.float()
    params = [sequence.request.params for sequence in sequences]
    finite = torch.isfinite(logits).all(dim=-1)
    scores = _penalize(logits, sequences)
    tokens = scores.argmax(dim=-1)
    drawing = [row for row, own in enumerate(params) if own.do_sample]
    if drawing:
        uniform = torch.tensor([_uniform(sequences[row]) for row in drawing], device=logits.device)
        drawn = _draw(scores[drawing], [params[row] for row in drawing], uniform)
        tokens[drawing] = drawn
    log_probs: list[float | None] = [None] * len(sequences)
    wanted = [row for row, own in enumerate(params) if own.details]
    if wanted:
        chosen = logits[wanted].log_softmax(dim=-1).gather(1, tokens[wanted].unsqueeze(1))
        for row, log_prob in zip(wanted, chosen.squeeze(1).tolist(), strict=True):
            log_probs[row] = log_prob
    return [Sample(*each) for each in zip(tokens.tolist(), log_probs, finite.tolist(), strict=True)]


def _penalize(logits: torch.Tensor, sequences: SequenceOf[Sequence]) -> torch.Tensor:
    """Repetition penalty as in CTRL (arXiv:1909.05858) and transformers: over prompt and generated tokens."""
    rows = [row for row, seq in enumerate(sequences) if seq.request.params.repetition_penalty != 1.0]
    if not rows:
        return logits
    scores = logits.clone()
    for row in rows:
        seen = torch.tensor(sorted(set(sequences[row].tokens)), device=logits.device)
        penalty = sequences[row].request.params.repetition_penalty
        own = scores[row, seen]
        scores[row, seen] = torch.where(own < 0, own * penalty, own / penalty)
    return scores


def _draw(scores: torch.Tensor, params: list[SamplingParams], uniform: torch.Tensor) -> torch.Tensor:
    """Temperature, top-k, top-p, in that order, then the token at `uniform` of the distribution left.

    scores [rows, vocabulary] float32, uniform [rows] in [0, 1). Returns [rows] token ids.
    """
    device = scores.device
    temperature = torch.tensor([own.temperature for own in params], device=device).unsqueeze(1)
    top_k = torch.tensor([own.top_k or scores.shape[1] for own in params], device=device).unsqueeze(1)
    top_p = torch.tensor([own.top_p for own in params], device=device).unsqueeze(1)
    ordered, ids = (scores / temperature).sort(dim=-1, descending=True, stable=True)
    ordered = ordered.masked_fill(torch.arange(scores.shape[1], device=device) >= top_k, -torch.inf)
    probs = ordered.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs
    # A token stays while those before it do not reach top_p: the likeliest always stays.
    kept = probs.masked_fill((before >= top_p) & (before > 0), 0.0).double().cumsum(dim=-1)
    target = uniform.double().unsqueeze(1) * kept[:, -1:]
    index = torch.searchsorted(kept, target, right=True).clamp_(max=scores.shape[1] - 1)
    return ids.gather(1, index).squeeze(1)


def _uniform(sequence: Sequence) -> float:
    """A number in [0, 1) that only the row's seed and the count of its generated tokens decide."""
    seed = sequence.request.params.seed
    source = f"id:{sequence.request.id}" if seed is None else f"seed:{seed}"
    digest = hashlib.blake2b(f"{source}:{sequence.num_generated}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53
