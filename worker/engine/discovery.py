"""What a base model is made of: as far as its modules show, and as one pass of a short example shows."""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from worker.engine.adapter import Target
from worker.engine.projections import features, is_linear


class Discovery(NamedTuple):
    targets: dict[str, Target]
    """Every module that a `target_modules` may name, with its features, or why it cannot take LoRA."""
    groups: list[tuple[str, ...]]
    """Linear modules that see the batch's tokens, in order of call; those given one tensor together."""
    head: str | None
    """The linear module that makes the logits."""


def discover(model: PreTrainedModel, forward: Callable[[], object], num_tokens: int) -> Discovery:
    """Watch the modules while `forward` puts `num_tokens` tokens through the model.

    A module that sees another number of tokens (an expert, the head) has no slots for them.
    """
    calls: list[tuple[str, nn.Module, torch.Tensor]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], torch.Tensor) and args[0].ndim > 1:
                calls.append((name, module, args[0]))

        return hook

    handles = [module.register_forward_pre_hook(note(name)) for name, module in _leaves(model)]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    seen = {name: x.shape[:-1].numel() for name, _, x in calls}
    leaves = _leaves(model)
    targets = {name: _target(module, module is head, seen.get(name) == num_tokens) for name, module in leaves}
    usable = [(name, x) for name, _, x in calls if not targets[name].refused]
    names = [name for name, module in leaves if module is head and is_linear(module)]
    return Discovery(targets, _group_by_input(usable), names[0] if names else None)


def foresee(outline: PreTrainedModel) -> dict[str, Target]:
    """The targets that `discover` will find, told from modules without weights.

    Only a pass shows that a module does not see the batch's tokens, so it may have to be refused yet.
    """
    head = outline.get_output_embeddings()  # type: ignore[no-untyped-call]
    return {name: _target(module, module is head, sees_the_batch=True) for name, module in _leaves(outline)}


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


def _target(module: nn.Module, is_head: bool, sees_the_batch: bool) -> Target:
    if not is_linear(module):
        return Target(0, 0, f"{type(module).__name__} modules are not supported")
    if is_head:
        return Target(*features(module), "the output embedding is not supported", is_head=True)
    if not sees_the_batch:
        return Target(*features(module), "its input is not the tokens of the batch")
    return Target(*features(module))
