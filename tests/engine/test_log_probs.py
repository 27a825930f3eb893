"""Log-probabilities of tokens that are there already, in little memory."""

import pytest
import torch

from tests.engine.sampling import logits_of
from worker.engine import log_probs
from worker.engine.log_probs import likely_tokens, token_log_probs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 5, 64])
def test_token_log_probs_are_log_softmax_at_the_tokens(count, dtype, monkeypatch):
    logits = logits_of(3, count, vocab=300).to(dtype)
    targets = torch.randint(300, (count,))
    expected = logits.float().log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    got = token_log_probs(logits, targets)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected)
    monkeypatch.setattr(log_probs, "_CPU_ELEMENTS", 1000)  # slices of three
    torch.testing.assert_close(token_log_probs(logits, targets), expected)


def test_slices_do_not_change_the_likely_tokens(monkeypatch):
    logits = logits_of(3, 10, vocab=300).bfloat16()
    tokens, found = likely_tokens(logits, 7)
    monkeypatch.setattr(log_probs, "_CPU_ELEMENTS", 1)
    sliced, again = likely_tokens(logits, 7)
    assert torch.equal(tokens, sliced)
    torch.testing.assert_close(found, again)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_memory_is_bounded_whatever_the_length(device, monkeypatch):
    biggest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal biggest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result._base is None:
                biggest = max(biggest, result.numel() * result.element_size())
            return result

    monkeypatch.setattr(log_probs, "_CPU_ELEMENTS", 5000)
    monkeypatch.setattr(log_probs, "_ELEMENTS", 5000)
    logits = torch.zeros(400, 1000, dtype=torch.bfloat16, device=device)
    with Watch():
        token_log_probs(logits, torch.zeros(400, dtype=torch.int64, device=device))
    assert biggest == 5000 * 4


def test_a_token_that_cannot_be_has_minus_infinity():
    logits = torch.tensor([[0.0, -torch.inf]])
    assert token_log_probs(logits, torch.tensor([1])).tolist() == [-torch.inf]
