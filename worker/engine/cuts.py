"""How the linear modules of a model are cut among the ranks that share it. No processes here.

Which way a module is cut follows from the model's own plan in transformers (`tp_plan`).
"""

import enum
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from worker.engine.adapters.adapter import LoRAPair, LoRAWeights
from worker.engine.projections import features, is_linear
from worker.errors import ModelError


class Side(enum.Enum):
    OUT = "out"
    """Each rank makes its own columns of y from the whole x."""
    IN = "in"
    """Each rank makes an addend of the whole y from its own columns of x."""


class Cut(NamedTuple):
    """How one module is cut. What lies between an OUT and the IN after it is a rank's own part."""

    side: Side
    inside: bool = False
    """The model sees none of it: OUT gathers y, and IN takes its columns from a whole x."""


class Rank(NamedTuple):
    """One among `degree`."""

    number: int
    degree: int

    def part(self, size: int) -> slice:
        """What is this rank's of `size` things; the parts differ by one at most."""
        return slice(self.number * size // self.degree, (self.number + 1) * size // self.degree)


_CUTS = {
    "colwise": Cut(Side.OUT),
    "rowwise": Cut(Side.IN),
    "colwise_gather_output": Cut(Side.OUT, inside=True),
    "colwise_rep": Cut(Side.OUT, inside=True),
    "rowwise_split_input": Cut(Side.IN, inside=True),
    "rowwise_rep": Cut(Side.IN, inside=True),
}
_WHOLE = frozenset({
    "embedding_rowwise", "embedding_colwise", "replicate", "replicated_with_grad_allreduce",
})  # fmt: skip
"""What may as well stay whole on every rank."""


def plan_cuts(model: PreTrainedModel, degree: int) -> dict[str, Cut]:
    """By the names of linear modules, how each is cut in `degree` parts; the others stay whole.

    Raises ModelError for a model without such a plan, or with one that this does not follow, and where the
    model's heads or features cannot be divided so.
    """
    name = type(model).__name__
    plan: Mapping[str, str] = getattr(model, "tp_plan", None) or {}
    if not any(style in _CUTS for style in plan.values()):
        raise ModelError(
            f"tensor_parallel_degree is {degree}, and {name} has no plan for tensor parallelism in "
            "transformers: it must be 1"
        )
    cuts: dict[str, Cut] = {}
    for path, what in (*model.named_modules(), *model.named_parameters()):
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", path))
        if style is None or style in _WHOLE:
            continue
        if style not in _CUTS or not isinstance(what, nn.Module) or not is_linear(what):
            raise ModelError(
                f"tensor_parallel_degree is {degree}, and the plan of {name} has {style} for {path}, which "
                "is not supported: it must be 1"
            )
        cuts[path] = _CUTS[style]
        _check_features(path, what, cuts[path], degree)
    if any(not cut.inside for cut in cuts.values()):
        _check_heads(model, degree)
    return cuts


def _check_features(path: str, module: nn.Module, cut: Cut, degree: int) -> None:
    into, out = features(module)
    size, side = (into, "in_features") if cut.side is Side.IN else (out, "out_features")
    if size % degree if not cut.inside else size < degree:
        raise ModelError(f"tensor_parallel_degree {degree} does not divide {side} {size} of {path}")


def _check_heads(model: PreTrainedModel, degree: int) -> None:
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    numbers = {
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
    }
    wrong = [f"{name} {number}" for name, number in numbers.items() if number is not None and number % degree]
    if wrong:
        raise ModelError(
            f"tensor_parallel_degree {degree} does not divide {' and '.join(wrong)} of {type(model).__name__}"
        )


def cut_module(module: nn.Module, cut: Cut, rank: Rank) -> None:
    """Leave `module` its rank's part, in memory of its own. A bias is added once: where IN, by rank 0."""
    into, out = features(module)
    given: Any = module
    bias: torch.Tensor | None = given.bias
    if cut.side is Side.OUT:
        part = rank.part(out)
        weight = given.weight[:, part] if isinstance(module, Conv1D) else given.weight[part]
        bias = None if bias is None else bias[part]
        out = part.stop - part.start
    else:
        part = rank.part(into)
        weight = given.weight[part] if isinstance(module, Conv1D) else given.weight[:, part]
        bias = torch.zeros_like(bias) if bias is not None and rank.number else bias
        into = part.stop - part.start
    given.weight = _own(weight)
    given.bias = None if bias is None else _own(bias)
    if isinstance(module, Conv1D):
        module.nx, module.nf = into, out
    else:
        given.in_features, given.out_features = into, out


def _own(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)


def cut_weights(weights: LoRAWeights, cuts: Mapping[str, Cut], rank: Rank, *, fully: bool) -> LoRAWeights:
    """The part of an adapter that `rank` needs: one that only adds pairs, all else the loader refuses."""
    others = {*weights._fields} - {"key", "pairs", "rope_factor", "tokenizer"}  # that is rank 0's
    assert not any(getattr(weights, name) for name in others), f"more than pairs: {others}"
    pairs = {name: cut_pair(pair, cuts.get(name), rank, fully=fully) for name, pair in weights.pairs.items()}
    return LoRAWeights(weights.key, pairs, rope_factor=weights.rope_factor)


def cut_pair(pair: LoRAPair, cut: Cut | None, rank: Rank, *, fully: bool) -> LoRAPair:
    """A rank's part of one module's pair; views where that is possible.

    `fully` cuts both halves. For OUT then a is [r / degree, in], r rounded up to a multiple of degree with
    zeros, and b [out / degree, r]; for IN a is [r, in / degree] and b [out / degree, r]. Otherwise OUT leaves
    a whole and IN leaves b whole.
    """
    a, b = pair
    if cut is None:
        return pair
    if cut.side is Side.IN:
        return LoRAPair(a[:, rank.part(a.shape[1])], b[rank.part(len(b))] if fully else b)
    b = b[rank.part(len(b))]
    if not fully:
        return LoRAPair(a, b)
    own = -(-len(a) // rank.degree)
    missing = own * rank.degree - len(a)
    a = a[rank.number * own : (rank.number + 1) * own]
    return LoRAPair(functional.pad(a, (0, 0, 0, own - len(a))), functional.pad(b, (0, missing)))
