"""Rows and logits for the tests of the sampler's parts, and what transformers makes of them."""

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from worker.engine.sampler import choose, collect, prepare
from worker.engine.sequence import Sequence
from worker.jobs import InferenceRequest, SamplingParams

VOCAB = 24
CPU = torch.device("cpu")


def row(name="row", *, prompt=(1, 2, 3), generated=(), **params):
    sequence = Sequence(InferenceRequest(id=name, prompt=tuple(prompt), params=SamplingParams(**params)))
    for token in generated:
        sequence.append(token, None)
    return sequence


def logits_of(seed, rows=1, spread=2.0, vocab=VOCAB):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def sample(logits, sequences):
    """Choose a token for each row of `logits` [rows, vocabulary], as a step does, and wait for it."""
    return collect(choose(logits, prepare(sequences, logits.shape[1], logits.device)))


def warped(scores, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0):
    """The probabilities [rows, vocabulary] that transformers' `generate` draws from, by its own warpers."""
    warpers = LogitsProcessorList()
    if temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    if typical_p < 1.0:
        warpers.append(TypicalLogitsWarper(typical_p))
    return warpers(torch.zeros(len(scores), 1, dtype=torch.int64), scores.clone()).softmax(dim=-1)


def penalized(
    logits,
    prompt,
    generated,
    *,
    allowed_token_ids=(),
    logit_bias=(),
    repetition_penalty=1.0,
    frequency_penalty=0.0,
    presence_penalty=0.0,
):
    """Logits [1, vocabulary] after transformers' processors, and the penalties as OpenAI defines them."""
    scores = logits.clone()
    if allowed_token_ids:
        scores = torch.full_like(scores, -torch.inf)
        scores[:, list(allowed_token_ids)] = logits[:, list(allowed_token_ids)]
    ids = torch.tensor([[*prompt, *generated]])
    if logit_bias:
        scores = SequenceBiasLogitsProcessor([[[token], bias] for token, bias in logit_bias])(ids, scores)
    scores = RepetitionPenaltyLogitsProcessor(repetition_penalty)(ids, scores)
    for token in set(generated):
        scores[0, token] -= generated.count(token) * frequency_penalty + presence_penalty
    return scores


CUTS = [
    {},
    {"temperature": 0.3},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": VOCAB},
    {"top_k": 10 * VOCAB},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 1e-9},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"typical_p": 0.3},
    {"typical_p": 0.95},
    {"temperature": 2.0, "top_k": 12, "top_p": 0.8},
    {"temperature": 0.5, "top_k": 3, "top_p": 0.99},
    {"temperature": 4.0, "top_p": 0.6},
    {"temperature": 5.0, "top_p": 0.9, "min_p": 0.3},
    {"top_k": 15, "typical_p": 0.6},
    {"temperature": 3.0, "top_k": 16, "top_p": 0.97, "min_p": 0.02, "typical_p": 0.8},
]
