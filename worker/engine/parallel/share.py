"""One rank's share of a model: which part of each module it has, and what it tells the others meanwhile."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from worker.engine.adapters.adapter import LoRAWeights, Target
from worker.engine.cuts import Cut, Rank, Side, cut_module, cut_weights, plan_cuts
from worker.engine.parallel.group import Group
from worker.engine.projections import Exchange, LoRAShare, features


class Share:
    """What a rank has of one model. With `fully_sharded` both halves of an adapter are cut, else one."""

    group: Group
    """Those that have the rest, from when they have met: not needed to `take`."""

    def __init__(self, rank: Rank, *, fully_sharded: bool) -> None:
        self.rank = rank
        self._fully = fully_sharded
        self._cuts: dict[str, Cut] = {}
        self._features: dict[str, tuple[int, int]] = {}
        """Of the whole modules."""
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        """Of their parameters."""

    def take(self, model: PreTrainedModel) -> None:
        """Leave a whole `model` its parts. Raises ModelError if it cannot be shared."""
        modules = dict(model.named_modules())
        self._cuts = plan_cuts(model, self.rank.degree)
        for name, cut in self._cuts.items():
            own = modules[name]
            self._features[name] = features(own)
            self._shapes[name] = {key: tuple(one.shape) for key, one in own.named_parameters(recurse=False)}
            cut_module(modules[name], cut, self.rank)

    def whole(self, targets: Mapping[str, Target]) -> dict[str, Target]:
        """`targets` with the sizes that they have in the whole model, which adapters are made for."""
        whole = {}
        for name, target in targets.items():
            into, out = self._features.get(name, target[:2])
            shapes = self._shapes.get(name, target.shapes)
            whole[name] = target._replace(in_features=into, out_features=out, shapes=shapes)
        return whole

    def divide(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """Modules with one input in groups that are cut alike.

        A cut that the model does not see is alone, and so is an IN, whose LoRA goes by its own out.
        """
        groups: dict[object, list[str]] = {}
        for name in names:
            cut = self._cuts.get(name)
            is_alone = cut is not None and (cut.inside or cut.side is Side.IN)
            groups.setdefault(name if is_alone else cut, []).append(name)
        return [tuple(group) for group in groups.values()]

    def exchange(self, names: Sequence[str]) -> Exchange | None:
        """What a projection of modules that are cut alike needs of the others."""
        cut = self._cuts.get(names[0])
        if cut is None:
            return None
        into, out = self._features[names[0]]
        if cut.side is Side.IN:
            return _InExchange(self.group, into if cut.inside else None, out, fully=self._fully)
        return _OutExchange(self.group, out if cut.inside else None, fully=self._fully)

    @contextmanager
    def disguised(self, model: nn.Module) -> Iterator[None]:
        """For a pass before projections take over: modules that the model sees whole give and take the whole.

        What the pass computes means nothing.
        """
        modules, handles = dict(model.named_modules()), []
        for name, cut in self._cuts.items():
            exchange = self.exchange([name])
            if cut.inside and exchange is not None:
                handles += [
                    modules[name].register_forward_pre_hook(lambda _, args, own=exchange: own.enter(args[0])),
                    modules[name].register_forward_hook(lambda _, args, y, own=exchange: own.leave(y)),
                ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def weights(self, whole: LoRAWeights, rank: Rank) -> LoRAWeights:
        """The part of an adapter that `rank` needs."""
        return cut_weights(whole, self._cuts, rank, fully=self._fully)


class _OutExchange(Exchange):
    def __init__(self, group: Group, out: int | None, *, fully: bool) -> None:
        """`out` is the whole, if that is what the model is to be given."""
        self._group = group
        self._out = out
        self.lora = LoRAShare(group.rank.degree, None, group.gather) if fully else None

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """See Exchange."""
        return x

    def leave(self, y: torch.Tensor) -> torch.Tensor:
        """See Exchange."""
        if self._out is None:
            return y
        degree = self._group.rank.degree
        widest = -(-self._out // degree)
        parts = self._group.gather(functional.pad(y, (0, widest - y.shape[-1])))
        sizes = [part.stop - part.start for part in (Rank(n, degree).part(self._out) for n in range(degree))]
        if min(sizes) == widest:
            return parts.movedim(0, -2).flatten(-2)
        return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], dim=-1)


class _InExchange(Exchange):
    def __init__(self, group: Group, into: int | None, out: int, *, fully: bool) -> None:
        """`into` is the whole, if that is what the model gives."""
        self._group = group
        self._own = None if into is None else group.rank.part(into)
        self.lora = LoRAShare(1, group.rank.part(out), self._sum) if fully else None

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """See Exchange."""
        return x if self._own is None else x[..., self._own]

    def leave(self, y: torch.Tensor) -> torch.Tensor:
        """See Exchange."""
        self._group.sum_(y)
        return y

    def _sum(self, h: torch.Tensor) -> torch.Tensor:
        self._group.sum_(h)
        return h.unsqueeze(0)
