"""What a base model is made of: as far as its modules show, and as one pass of a short example shows."""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from worker.engine.adapters.adapter import Target
from worker.engine.projections import features, is_linear


class Discovery(NamedTuple):
    targets: dict[str, Target]
    """Every module that a `target_modules` may name, with its features, or why it cannot take LoRA."""
    groups: list[tuple[str, ...]]
    """Linear modules that see the batch's tokens, in order of call; those given one tensor together."""
    head: str | None
    """The linear module that makes the logits."""
    axes: dict[str, int]
    """Where the tokens are in what other modules are given."""


def discover(model: PreTrainedModel, forward: Callable[[], object], num_tokens: int) -> Discovery:
    """Watch the modules while `forward` puts `num_tokens` tokens through the model.

    A module that sees another number of tokens (an expert, the head) has no slots for them.
    """
    calls: list[tuple[str, nn.Module, torch.Tensor]] = []
    leaves = _leaves(model)

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], torch.Tensor) and args[0].ndim > 1:
                calls.append((name, module, args[0]))

        return hook

    handles = [module.register_forward_pre_hook(note(name)) for name, module in leaves]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    ends = _ends(model)
    seen = {name: _seen(x.shape, num_tokens) for name, _, x in calls}
    targets = {name: _target(module, ends, seen.get(name, _UNSEEN)) for name, module in leaves}
    usable = [
        (name, x)
        for name, module, x in calls
        if is_linear(module) and seen[name].is_packed and module is not ends.head
    ]
    names = [name for name, module in leaves if module is ends.head and is_linear(module)]
    axes = {name: own.axis for name, own in seen.items() if own.axis is not None}
    return Discovery(targets, _group_by_input(usable), names[0] if names else None, axes)


def foresee(outline: PreTrainedModel) -> dict[str, Target]:
    """The targets that `discover` will find, told from modules without weights.

    Only a pass shows that a module does not see the batch's tokens, so it may have to be refused yet.
    """
    ends = _ends(outline)
    return {name: _target(module, ends, _EVERY_TOKEN) for name, module in _leaves(outline)}


def _token_axis(shape: torch.Size, num_tokens: int) -> int | None:
    """Where the tokens are in a module's input; None if that is not plain to see."""
    axes = [axis for axis, size in enumerate(shape) if size == num_tokens]
    if len(shape) > 2 and axes and axes[-1] == len(shape) - 1:
        axes.pop()  # what is last are features
    return axes[0] if len(axes) == 1 else None


def _group_by_input(calls: list[tuple[str, torch.Tensor]]) -> list[tuple[str, ...]]:
    """A module that is called more than once stays alone. Ids hold: the tensors live as long as `calls`."""
    times = Counter(name for name, _ in calls)
    groups: dict[object, list[str]] = {}
    for name, x in calls:
        groups.setdefault(id(x) if times[name] == 1 else name, []).append(name)
    return [tuple(dict.fromkeys(names)) for names in groups.values()]


def _leaves(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if name and next(module.children(), None) is None
    ]


class _Ends(NamedTuple):
    """Where tokens come in and logits come out."""

    input: nn.Module
    head: nn.Module | None
    tied: bool


def _ends(model: PreTrainedModel) -> _Ends:
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    return _Ends(model.get_input_embeddings(), head, tied)


class _Seen(NamedTuple):
    """What a pass shows of a module's input."""

    is_packed: bool
    """All tokens of the batch follow each other in it, and nothing else is there but features."""
    axis: int | None
    """Where the tokens are."""


_EVERY_TOKEN = _Seen(is_packed=True, axis=1)
_UNSEEN = _Seen(is_packed=False, axis=None)


def _seen(shape: torch.Size, num_tokens: int) -> _Seen:
    return _Seen(shape[:-1].numel() == num_tokens, _token_axis(shape, num_tokens))


def _target(module: nn.Module, ends: _Ends, seen: _Seen) -> Target:
    kind = type(module).__name__
    shapes = {name: tuple(own.shape) for name, own in module.named_parameters(recurse=False)}
    astray = "its input is not the tokens of the batch"
    if is_linear(module):
        if module is ends.head:
            return Target(*features(module), is_head=True, is_tied=ends.tied, shapes=shapes)
        refused = "" if seen.is_packed else astray
        return Target(*features(module), refused, shapes=shapes, fixed=refused)
    if _is_embedding(module):
        is_input = module is ends.input
        refused = "" if seen.axis is not None else astray
        return Target(
            *_embedding_features(module),
            refused,
            is_embedding=True,
            is_input=is_input,
            is_tied=is_input and ends.tied,
            shapes=shapes,
            fixed=refused,
        )
    strange = f"{kind} modules are not supported"
    fixed = strange if "norm" not in kind.lower() else "" if seen.axis is not None else astray
    return Target(0, 0, strange, shapes=shapes, fixed=fixed)


def _is_embedding(module: nn.Module) -> bool:
    """Whether it looks rows up by id, and scales them at most."""
    is_plain = type(module).forward is nn.Embedding.forward
    return isinstance(module, nn.Embedding) and (is_plain or hasattr(module, "embed_scale"))


def _embedding_features(module: nn.Module) -> tuple[int, int]:
    assert isinstance(module, nn.Embedding)
    return module.num_embeddings, module.embedding_dim
