"""What the model thinks of tokens: natural logarithms of probabilities under its own distribution, which is
that of the logits as they leave the model, before penalties, biases, temperature and cuts.
"""

import torch

from worker.engine.draws import likeliest

_CPU_ELEMENTS, _ELEMENTS = 1 << 18, 1 << 22
"""Logits that are looked at at once, on a CPU about what its cache holds, elsewhere 16 MiB in float32; at
least those of one position."""


def token_log_probs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The log-probability of each of `tokens` int64 [t] under `logits` [t, vocabulary]: float32 [t].

    `tokens[i]` is the token that follows the position of `logits[i]`, chosen by whatever rule. Any floating
    type, computed in float32. Beside its result it needs at most 32 MiB of the device's memory, or twice the
    size of one float32 row of `logits` where that is more. Never waits for the device.
    """
    at_once = _at_once(logits)
    slices = zip(torch.split(logits, at_once), torch.split(tokens, at_once), strict=True)
    return torch.cat([_of(own, chosen) for own, chosen in slices])


def score_targets(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `token_log_probs`, and whether each target is the token that a greedy row would take: bool [t]."""
    log_probs, found = [], []
    at_once = _at_once(logits)
    for own, tokens in zip(torch.split(logits, at_once), torch.split(targets, at_once), strict=True):
        log_probs.append(_of(own, tokens))
        found.append(likeliest(own) == tokens)
    return torch.cat(log_probs), torch.cat(found)


def likely_tokens(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's `count` likeliest tokens and their log-probabilities: int64 and float32 [rows, count].

    logits [rows, vocabulary]. Memory as for `token_log_probs`.
    """
    tokens, found = [], []
    for own in torch.split(logits, _at_once(logits)):
        scores = own.float()
        best = scores.topk(count)
        tokens.append(best.indices)
        found.append(best.values - scores.logsumexp(-1, keepdim=True))
    return torch.cat(tokens), torch.cat(found)


def _at_once(logits: torch.Tensor) -> int:
    return max(1, (_CPU_ELEMENTS if logits.device.type == "cpu" else _ELEMENTS) // logits.shape[1])


def _of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    scores = logits.float()
    return scores.gather(1, tokens.unsqueeze(1)).squeeze(1) - scores.logsumexp(-1)
