"""What the adapters in the slots do to modules beside plain LoRA, applied to the tokens of each of them.

The base model's modules compute what they compute for all tokens of a step; then the tokens of an adapter
that changes a module are given what it makes of them. A step without such an adapter pays nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.pytorch_utils import Conv1D

from worker.engine.adapters.adapter import Change, LoRAPair, LoRAWeights, Target
from worker.engine.changes.kinds import (
    ChangedEmbedding,
    ChangedHead,
    ChangedLinear,
    Gains,
    change_embedding,
    change_head,
    change_linear,
    change_other,
    find_gains,
)
from worker.engine.lora_plan import Run, merge_runs
from worker.engine.projections import Projection


class ChangeStep(NamedTuple):
    """Whose tokens are where in a step; adapters that change nothing are left out."""

    tokens: Sequence[Run]
    """Among all of them."""
    kept: Sequence[Run]
    """Among those that give logits."""
    num_extra: int
    """How many logits more than the base model's the step has."""


class _Place(NamedTuple):
    """Where a linear module is computed."""

    projection: Projection
    number: int


class ModuleChanges:
    """The changes of the adapters in the slots of one engine, used from its thread only.

    While `step` is None every module computes what it computes by itself.
    """

    def __init__(
        self,
        model: nn.Module,
        projections: Mapping[tuple[str, ...], Projection],
        head: tuple[str, Projection] | None,
        targets: Mapping[str, Target],
        axes: Mapping[str, int],
    ) -> None:
        """`projections` by the names of their modules, `axes` as in Discovery."""
        self.step: ChangeStep | None = None
        self._modules = {name: module for name, module in model.named_modules() if name in targets}
        self._targets = targets
        self._axes = axes
        self._places = {
            name: _Place(projection, number)
            for names, projection in projections.items()
            for number, name in enumerate(names)
        }
        self._projections = projections
        self._gains: Gains = WeakTensorKeyDictionary()
        """Those of adapters in memory: worked out once, however often they get a slot."""
        self._head = head
        self._num_logits = 0 if head is None else targets[head[0]].num_tokens
        self._widths: dict[int, int] = {}
        """By slot, of adapters that change something: tokens that each can write."""
        self._linear: dict[Projection, dict[int, list[tuple[slice, ChangedLinear]]]] = {}
        self._heads: dict[int, ChangedHead] = {}
        self._embeddings: dict[str, dict[int, ChangedEmbedding]] = {}
        self._others: dict[str, dict[int, nn.Module]] = {}

    def put(self, slot: int, weights: LoRAWeights) -> LoRAWeights:
        """Replace whatever `slot` holds by the changes of `weights`.

        Returns the adapter with the pairs that LoRA is to add.
        """
        self.clear(slot)
        if not weights.changes and weights.vocabulary is None:
            return weights
        width = self._num_logits if weights.vocabulary is None else weights.vocabulary.writes
        try:
            self._find_gains(weights)
            pairs = dict(weights.pairs)
            for name, change in weights.changes.items():
                if name in self._places:
                    pair = self._put_linear(slot, name, change, pairs.pop(name, None))
                    if pair is not None:
                        pairs[name] = pair
                elif self._targets[name].is_head:
                    assert self._head is not None
                    self._heads[slot] = change_head(self._head[1], width, change, self._gains)
                elif self._targets[name].is_embedding:
                    module = self._modules[name]
                    assert isinstance(module, nn.Embedding)
                    changed_embedding = change_embedding(module, change, self._gains)
                    self._embeddings.setdefault(name, {})[slot] = changed_embedding
                else:
                    changed = change_other(self._modules[name], change.parameters)
                    self._others.setdefault(name, {})[slot] = changed
            self._widths[slot] = width
        except BaseException:
            self.clear(slot)
            raise
        self._install()
        return weights._replace(pairs=pairs)

    def clear(self, slot: int) -> None:
        """Drop what `slot` holds."""
        self._widths.pop(slot, None)
        self._heads.pop(slot, None)
        held: Any
        for held in (self._linear, self._embeddings, self._others):
            for by_slot in held.values():
                by_slot.pop(slot, None)
        self._install()

    def width(self, slot: int | None) -> int | None:
        """How many logits the tokens of a slot have; None for as many as the base model's."""
        width = None if slot is None else self._widths.get(slot)
        return width if width != self._num_logits else None

    def plan(self, spans: Sequence[tuple[int | None, int, int]]) -> ChangeStep | None:
        """The step for rows of `(slot, tokens, tokens that give logits)`; None if no adapter changes any."""
        if not self._widths:
            return None
        own = [(slot if slot in self._widths else None, tokens, kept) for slot, tokens, kept in spans]
        if all(slot is None for slot, *_ in own):
            return None
        keeping = merge_runs((slot, kept) for slot, _, kept in own)
        return ChangeStep(
            tokens=merge_runs((slot, tokens) for slot, tokens, _ in own),
            kept=[run for run in keeping if run[1] < run[2]],
            num_extra=max(
                0, *(self._widths[slot] - self._num_logits for slot, *_ in own if slot is not None)
            ),
        )

    def _find_gains(self, weights: LoRAWeights) -> None:
        for names, projection in self._projections.items():
            own = [(number, name) for number, name in enumerate(names) if name in weights.changes]
            found = {number: (weights.changes[name], weights.pairs.get(name)) for number, name in own}
            find_gains(self._gains, projection, found)

    def _put_linear(self, slot: int, name: str, change: Change, pair: LoRAPair | None) -> LoRAPair | None:
        projection, number = self._places[name]
        changed, pair = change_linear(
            projection,
            number,
            change,
            pair,
            is_transposed=isinstance(self._modules[name], Conv1D),
            gain=None if change.magnitude is None else self._gains[change.magnitude],
        )
        by_slot = self._linear.setdefault(projection, {}).setdefault(slot, [])
        by_slot.append((projection.columns[number], changed))
        return pair

    def _install(self) -> None:
        """Stand where some adapter changes something, and nowhere else."""
        for projection, by_slot in self._linear.items():
            projection.change = partial(self._change_linear, by_slot) if by_slot else None
        if self._head is not None:
            self._head[1].widening = self._widen if self._widths else None
        for name, embeddings in self._embeddings.items():
            self._stand(name, partial(self._embed, name, embeddings) if embeddings else None)
        for name, others in self._others.items():
            self._stand(name, partial(self._compute, name, others) if others else None)

    def _stand(self, name: str, forward: Callable[..., torch.Tensor] | None) -> None:
        module = self._modules[name]
        if forward is not None:
            module.forward = forward
        else:
            module.__dict__.pop("forward", None)  # and its class's is there again

    def _change_linear(
        self, by_slot: Mapping[int, list[tuple[slice, ChangedLinear]]], x: torch.Tensor, y: torch.Tensor
    ) -> None:
        for slot, start, stop in () if self.step is None else self.step.tokens:
            for columns, changed in by_slot.get(slot, ()):
                changed.apply(x[start:stop], y[start:stop, columns])

    def _widen(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.step is None:
            return y
        if self.step.num_extra:
            y = nn.functional.pad(y, (0, self.step.num_extra))
        for slot, start, stop in self.step.kept:
            if slot in self._heads:
                self._heads[slot].apply(x[start:stop], y[start:stop])
        return y

    def _embed(self, name: str, by_slot: Mapping[int, ChangedEmbedding], ids: torch.Tensor) -> torch.Tensor:
        module: Any = self._modules[name]
        # Ids of an adapter's own tokens are not among the base model's rows.
        y: torch.Tensor = type(module).forward(module, ids.clamp(max=module.num_embeddings - 1))
        flat, rows = ids.reshape(-1), y.view(-1, y.shape[-1])
        for slot, start, stop in () if self.step is None else self.step.tokens:
            if slot in by_slot:
                by_slot[slot].apply(flat[start:stop], rows[start:stop])
        return y

    def _compute(
        self, name: str, by_slot: Mapping[int, nn.Module], x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        module: Any = self._modules[name]
        y: torch.Tensor = type(module).forward(module, x, *args, **kwargs)
        axis = self._axes[name]
        for slot, start, stop in () if self.step is None else self.step.tokens:
            if slot in by_slot:
                own = x.narrow(axis, start, stop - start)
                y.narrow(axis, start, stop - start).copy_(by_slot[slot](own, *args, **kwargs))
        return y
