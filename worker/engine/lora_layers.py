"""LoRA on the modules of a base model, by forward hooks: the modules and their names stay as they are."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from worker.engine.adapter import LoRAPair, LoRAWeights, Target
from worker.engine.lora_ops import Run, add_lora_packed, add_lora_segments, foreign_ranks, pack_pairs

_PACKED_LIMIT = 1 << 15
"""Packed products waste tokens x ranks on columns that are masked; beyond this the runs are cheaper.
tests/benchmarks/lora_ops.py prints the measurement."""


class LoRAPlan:
    """How one step applies LoRA; the same for every module.

    `runs` covers the tokens that use an adapter; base rows are in none. A plan is built once a step
    and dropped after it.
    """

    def __init__(self, runs: Sequence[Run], num_tokens: int) -> None:
        self.runs = tuple(runs)
        self.num_tokens = num_tokens
        self.slots = tuple(sorted({slot for slot, _, _ in runs}))
        self._foreign: dict[tuple[tuple[int, int], ...], torch.Tensor] = {}

    def prefers_packed(self, total_rank: int) -> bool:
        return len(self.runs) > 2 and self.num_tokens * total_rank <= _PACKED_LIMIT

    def foreign(self, layout: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
        """See `foreign_ranks`; modules with the same layout share it."""
        mask = self._foreign.get(layout)
        if mask is None:
            mask = self._foreign[layout] = foreign_ranks(self.runs, layout, self.num_tokens, device)
        return mask


class LoRALayers:
    """The slot banks of a model: for every module that some adapter uses, the weights by slot.

    Owned by one engine and used from its thread. While `plan` is None every module computes what it
    computes without LoRA. A module gets its hook when the first adapter needs it.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.plan: LoRAPlan | None = None
        self._modules = dict(model.named_modules())
        self._device = device
        self._banks: dict[str, _Bank] = {}

    def put(self, slot: int, weights: LoRAWeights) -> None:
        """Replace whatever `slot` holds by `weights`."""
        self.clear(slot)
        for name, pair in weights.pairs.items():
            bank = self._banks.get(name)
            if bank is None:
                bank = self._banks[name] = _Bank(self)
                self._modules[name].register_forward_hook(bank)
            bank.put(slot, LoRAPair(*(tensor.to(self._device, non_blocking=True) for tensor in pair)))

    def clear(self, slot: int) -> None:
        for bank in self._banks.values():
            bank.clear(slot)


class _Bank:
    """One module's adapters, by slot; called as the module's forward hook."""

    def __init__(self, layers: LoRALayers) -> None:
        self._layers = layers
        self._pairs: dict[int, LoRAPair] = {}
        self._packed_slots: tuple[int, ...] | None = None
        self._packed: LoRAPair | None = None
        self._layout: tuple[tuple[int, int], ...] = ()

    def put(self, slot: int, pair: LoRAPair) -> None:
        self._pairs[slot] = pair
        self._packed_slots = None

    def clear(self, slot: int) -> None:
        if self._pairs.pop(slot, None) is not None:
            self._packed_slots = None

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        plan = self._layers.plan
        if plan is None:
            return
        y = output.view(-1, output.shape[-1])
        x = args[0].reshape(-1, args[0].shape[-1])
        assert len(x) == plan.num_tokens, "an adapter is on a module that does not see the batch's tokens"
        pair = next(iter(self._pairs.values()), None)
        if pair is None:
            return
        if pair.a.dtype == y.dtype:
            self._add(x, y, plan)
        else:  # `lora_dtype` differs from the base model's: the product is made in it, the sum in ours
            delta = torch.zeros_like(y, dtype=pair.a.dtype)
            self._add(x.to(pair.a.dtype), delta, plan)
            y.add_(delta)

    def _add(self, x: torch.Tensor, y: torch.Tensor, plan: LoRAPlan) -> None:
        packed = self._pack(plan.slots)
        if packed is None:
            return
        if plan.prefers_packed(packed.rank):
            add_lora_packed(x, y, packed, plan.foreign(self._layout, x.device))
        else:
            add_lora_segments(x, y, plan.runs, self._pairs)

    def _pack(self, slots: tuple[int, ...]) -> LoRAPair | None:
        """The pairs of `slots` side by side; kept until the active slots or their weights change."""
        if slots != self._packed_slots:
            present = [slot for slot in slots if slot in self._pairs]
            self._packed = pack_pairs([self._pairs[slot] for slot in present]) if present else None
            self._layout = tuple((slot, self._pairs[slot].rank) for slot in present)
            self._packed_slots = slots
        return self._packed


def find_targets(
    model: PreTrainedModel, seen_tokens: Mapping[str, int], num_tokens: int
) -> dict[str, Target]:
    """Every module that a `target_modules` may name, with its features, or why it cannot take LoRA.

    `seen_tokens` says how many tokens each leaf module saw in a forward pass of `num_tokens`: a module
    that sees others (an expert, the head) has no slot for them.
    """
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    targets = {}
    for name, module in model.named_modules():
        if not name or next(module.children(), None) is not None:
            continue
        features = _features(module)
        if features is None:
            targets[name] = Target(0, 0, f"{type(module).__name__} modules are not supported")
        elif module is head:
            targets[name] = Target(*features, "the output embedding is not supported", is_head=True)
        elif seen_tokens.get(name) != num_tokens:
            targets[name] = Target(*features, "its input is not the tokens of the batch")
        else:
            targets[name] = Target(*features)
    return targets


def _features(module: nn.Module) -> tuple[int, int] | None:
    if type(module) is nn.Linear:
        return module.in_features, module.out_features
    if type(module) is Conv1D:
        return module.nx, module.nf
    return None
