"""Rows for tests of the scheduler."""

from worker.engine.sequence import Sequence
from worker.jobs import AdapterKey, FinishReason, InferenceRequest, SamplingParams

KEYS = [AdapterKey(f"adapter{number // 2}", f"{number % 2}") for number in range(6)]


def sequence(name="row", tokens=3, adapter=None, max_new_tokens=4, **params):
    """A waiting row; `tokens` of a number are as many that no other row has."""
    prompt = tuple(tokens) if not isinstance(tokens, int) else tuple((name, n) for n in range(tokens))
    params = SamplingParams(max_new_tokens=max_new_tokens, **params)
    return Sequence(InferenceRequest(id=name, prompt=prompt, adapter=adapter, params=params))


def at_length(row):
    return FinishReason.LENGTH if row.num_generated >= row.request.params.max_new_tokens else None
