"""Scores -> tokens: the likeliest of a row, or one that a number drawn from the row's seed points at.

Temperature, top-k, top-p, min-p and typical-p follow transformers' warpers, in their order. Each cut keeps
the tokens within some distance, so that equally likely tokens stay or go together, in whatever order a device
sorts them. (As in transformers' top-k and typical-p; of tokens that tie at top-p's edge transformers keeps
some.) What is left stands in the vocabulary's order when the number points at it, so that rounding cannot
change a draw by swapping two tokens that are about as likely.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch

from worker.engine.sequence import Sequence

_CPU_ELEMENTS, _ELEMENTS = 1 << 18, 1 << 23
"""Scores that are drawn from at once, on a CPU about what its cache holds, elsewhere 32 MiB in float32; at
least those of one row."""
_BLOCK = 256
_FEW = 1024
"""On a CPU, where a branch costs nothing, this many tokens are sorted before the whole vocabulary is."""
_RESOLUTION = 53
"""Bits of a row's random number: what a float64 holds."""


class Draws(NamedTuple):
    """Rows that are drawn and have the same kinds of cuts. The tensors have one element for each of them."""

    rows: torch.Tensor
    """int64: where they stand in the batch."""
    uniform: torch.Tensor
    """int64: the row's random number in [0, 1), times 2 ** 53."""
    temperature: torch.Tensor
    """float32."""
    top_k: torch.Tensor
    """int64."""
    top_p: torch.Tensor
    """float32, as are the next two."""
    min_p: torch.Tensor
    typical_p: torch.Tensor
    most: int
    """Largest `top_k`; 0 if none of these rows has one."""
    by_mass: bool
    """Whether they have a top_p, a min_p, a typical_p."""
    by_ratio: bool
    by_surprise: bool


def plan_draws(
    sequences: SequenceOf[Sequence], pending: SequenceOf[int], vocab_size: int, device: torch.device
) -> tuple[Draws, ...]:
    """The rows to be drawn on `device`, grouped by their cuts. See `sampler.prepare`."""

    def cuts(row: int) -> tuple[bool, ...]:
        own = sequences[row].request.params
        return 0 < own.top_k < vocab_size, own.top_p < 1, own.typical_p < 1, own.min_p > 0

    found = [row for row, sequence in enumerate(sequences) if sequence.request.params.do_sample]
    at_once = max(1, (_CPU_ELEMENTS if device.type == "cpu" else _ELEMENTS) // vocab_size)
    draws = []
    for (by_rank, by_mass, by_surprise, by_ratio), group in itertools.groupby(sorted(found, key=cuts), cuts):
        alike = list(group)
        for start in range(0, len(alike), at_once):
            rows = alike[start : start + at_once]
            own = [sequences[row].request.params for row in rows]
            draws.append(
                Draws(
                    rows=torch.tensor(rows),
                    uniform=torch.tensor([_uniform(sequences[row], pending[row]) for row in rows]),
                    temperature=_floats(params.temperature for params in own),
                    top_k=torch.tensor([params.top_k for params in own]),
                    top_p=_floats(params.top_p for params in own),
                    min_p=_floats(params.min_p for params in own),
                    typical_p=_floats(params.typical_p for params in own),
                    most=max(params.top_k for params in own) if by_rank else 0,
                    by_mass=by_mass,
                    by_ratio=by_ratio,
                    by_surprise=by_surprise,
                )
            )
    return tuple(draws)


def draw(scores: torch.Tensor, draws: Draws) -> torch.Tensor:
    """A token for each of these rows of `scores` [rows, vocabulary], of any floating type: int64 [draws].

    Never waits for the device, unless that is the CPU. Its temporaries are at most about ten times the size
    of the rows in float32. A row without a finite maximum gets a token that means nothing.
    """
    distance = scores.index_select(0, draws.rows).float()
    distance.sub_(distance.amax(-1, keepdim=True)).div_(-draws.temperature.unsqueeze(1))
    weights = distance.neg().exp_()
    if draws.most:
        nearest, ids = distance.topk(draws.most, largest=False)
        _keep(weights, distance, nearest.gather(1, draws.top_k.unsqueeze(1) - 1))
        if draws.by_mass:
            _keep(weights, distance, _reach(nearest, ids, weights, draws.top_p))
    elif draws.by_mass:
        _keep(weights, distance, _reach_of_all(distance, weights, draws.top_p))
    if draws.by_ratio:  # the likeliest token has weight 1
        _keep(weights, weights.neg(), -draws.min_p.unsqueeze(1))
    if draws.by_surprise:
        oddity = _oddity(distance, weights)
        _keep(weights, oddity, _reach_of_all(oddity, weights, draws.typical_p))
    return _pick(weights, draws.uniform)


def likeliest(scores: torch.Tensor) -> torch.Tensor:
    """The first of each row's largest scores [rows, vocabulary]: int64 [rows]."""
    if scores.device.type != "cpu":
        return scores.argmax(-1)
    # The CPU's argmax takes a number at a time, its amax a vector: 15 times as fast.
    block = _by_block(scores, lambda values: values.amax(-1)).argmax(-1, keepdim=True)
    index = _within(block, scores.shape[1])
    return index.gather(1, scores.gather(1, index).argmax(-1, keepdim=True)).squeeze(1)


def _keep(weights: torch.Tensor, keys: torch.Tensor, reach: torch.Tensor) -> None:
    """Set the weights of tokens whose key is beyond `reach` [draws, 1] to 0."""
    # On a CPU a tenth of the time that a mask of booleans takes.
    weights.mul_(torch.le(keys, reach, out=torch.empty_like(weights)))


def _reach(
    nearest: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, share: torch.Tensor
) -> torch.Tensor:
    """The least key such that tokens up to it have `share` [draws] of all weight: [draws, 1].

    `nearest` [draws, any] are the least keys of a row, in order, and `ids` their tokens; the last of them
    where they do not suffice.
    """
    mass = weights.gather(1, ids).cumsum(-1)
    index = (mass < share.unsqueeze(1) * weights.sum(-1, keepdim=True)).sum(-1, keepdim=True)
    return nearest.gather(1, index.clamp_(max=nearest.shape[1] - 1))


def _reach_of_all(keys: torch.Tensor, weights: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """`_reach` among the keys of the whole vocabulary, [draws, vocabulary]."""
    if keys.device.type != "cpu" or keys.shape[1] <= _FEW:
        return _reach(*keys.sort(-1), weights, share)
    nearest, ids = keys.topk(_FEW, largest=False)
    reach = _reach(nearest, ids, weights, share)
    beyond = ~(reach < nearest[:, -1:]).squeeze(1)
    if beyond.any():
        reach[beyond] = _reach(*keys[beyond].sort(-1), weights[beyond], share[beyond])
    return reach


def _oddity(distance: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """How far each token's surprise is from the expected one (arXiv:2202.00666), of those with a weight."""
    total = weights.sum(-1, keepdim=True)
    surprise = distance + total.log()
    expected = torch.where(weights > 0, weights * surprise, 0.0).sum(-1, keepdim=True) / total
    return (surprise - expected).abs_().masked_fill_(weights == 0, torch.inf)


def _pick(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token at which the running sum of `weights` [draws, vocabulary] passes that share of the whole.

    In two steps, over blocks and within one, which costs a fraction of a float64 sum over the vocabulary.
    """
    share = uniform.unsqueeze(1).double() * 2.0**-_RESOLUTION
    ends = _by_block(weights, lambda values: values.sum(-1)).cumsum(-1, dtype=torch.float64)
    target = share * ends[:, -1:]  # less than the whole, also after rounding
    block = (ends <= target).sum(-1, keepdim=True).clamp_(max=ends.shape[1] - 1)
    target = target - torch.where(block > 0, ends.gather(1, (block - 1).clamp_(min=0)), 0.0)
    index = _within(block, weights.shape[1])
    inside = block * _BLOCK + torch.arange(_BLOCK, device=weights.device) < weights.shape[1]
    ends = torch.where(inside, weights.gather(1, index), 0.0).cumsum(-1, dtype=torch.float64)
    # The block's own sum was rounded: beyond its end stand tokens without weight, if any.
    target = torch.minimum(target, torch.nextafter(ends[:, -1:], torch.zeros_like(target)))
    offset = (ends <= target).sum(-1, keepdim=True).clamp_(max=_BLOCK - 1)
    return index.gather(1, offset).squeeze(1)


def _by_block(values: torch.Tensor, reduce: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Each block of each row reduced: [rows, blocks]."""
    whole = values.shape[1] // _BLOCK * _BLOCK
    parts = [reduce(values[:, :whole].reshape(len(values), whole // _BLOCK, _BLOCK))]
    if whole < values.shape[1]:
        parts.append(reduce(values[:, whole:].unsqueeze(1)))
    return torch.cat(parts, dim=1)


def _within(block: torch.Tensor, size: int) -> torch.Tensor:
    """The indices in a row's block [rows, 1], the row's last one repeated: [rows, _BLOCK]."""
    return (block * _BLOCK + torch.arange(_BLOCK, device=block.device)).clamp_(max=size - 1)


def _floats(numbers: Iterable[float]) -> torch.Tensor:
    return torch.tensor(list(numbers), dtype=torch.float32)


def _uniform(sequence: Sequence, pending: int) -> int:
    """A number in [0, 2 ** 53) that only the row's seed and the count of its generated tokens decide."""
    seed = sequence.request.params.seed
    source = f"id:{sequence.request.id}" if seed is None else f"seed:{seed}"
    step = sequence.num_generated + pending
    digest = hashlib.blake2b(f"{source}:{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - _RESOLUTION)
