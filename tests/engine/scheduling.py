"""Rows for tests of the scheduler."""

from worker.engine.sequence import Sequence
from worker.jobs import AdapterKey, FinishReason, InferenceRequest, SamplingParams

KEYS = [AdapterKey(f"adapter{number // 2}", f"{number % 2}") for number in range(6)]


def sequence(name="row", tokens=3, adapter=None, max_new_tokens=4, targets=(), interactive=False, **params):
    """A waiting row; `tokens` of a number are as many that no other row has, and so with `targets`."""
    prompt = tuple(tokens) if not isinstance(tokens, int) else tuple((name, n) for n in range(tokens))
    targets = tuple(range(targets)) if isinstance(targets, int) else tuple(targets)
    params = SamplingParams(max_new_tokens=0 if targets else max_new_tokens, **params)
    request = InferenceRequest(
        id=name, prompt=prompt, adapter=adapter, params=params, targets=targets, interactive=interactive
    )
    return Sequence(request)


def at_length(row):
    return FinishReason.LENGTH if row.num_generated >= row.request.params.max_new_tokens else None
