"""The tensors of an adapter that does more than add to linear modules -> what it does to each module."""

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import torch

from worker.engine.adapters.adapter import Change, LoRAPair, Rows
from worker.engine.adapters.plan import Plan, Role
from worker.engine.fingerprints import fingerprints
from worker.errors import AdapterInvalid


class Kinds(NamedTuple):
    """How an engine wants an adapter's tensors."""

    lora: torch.dtype
    base: torch.dtype
    """Of what stands for the base model's own."""
    pin: bool
    """In memory that a GPU reads by itself."""


class _Found:
    """The tensors of one module."""

    def __init__(self) -> None:
        self.by_role: dict[Role, torch.Tensor] = {}
        self.parameters: dict[str, torch.Tensor] = {}


def not_finite(module: str, dtype: torch.dtype) -> AdapterInvalid:
    return AdapterInvalid(f"module {module} has weights that are not finite in {dtype}", "values")


def assemble(
    plan: Plan, tensors: Mapping[str, torch.Tensor], kinds: Kinds, base_rows: Mapping[str, torch.Tensor]
) -> tuple[dict[str, LoRAPair], dict[str, Change]]:
    """The pairs of an adapter and its changes, by module, from the tensors of its file as `plan` names them.

    `base_rows` has fingerprints of the rows that embeddings and head have in the base model: what is the same
    in the adapter's own is left out. Raises AdapterInvalid for what is not finite.
    """
    found = defaultdict[str, _Found](_Found)
    for name, tensor in tensors.items():
        wanted = plan.wanted[name]
        if wanted.role is Role.PARAMETER:
            found[wanted.module].parameters[wanted.parameter] = tensor
        elif wanted.role is not Role.SPARE:
            found[wanted.module].by_role[wanted.role] = tensor
    _share_tied(plan, found)
    pairs, changes = {}, {}
    for module, own in found.items():
        pair, change = _read(plan, module, own, kinds, base_rows.get(module))
        if pair is not None:
            pairs[module] = pair
        if any(True for _ in change.tensors):
            changes[module] = change
    return pairs, changes


def _share_tied(plan: Plan, found: dict[str, _Found]) -> None:
    """Give modules that share their weights what the file says once."""
    for module, source in plan.tied.items():
        found[module].by_role[Role.TOKENS] = found[source].by_role[Role.TOKENS]
    tied = [name for name, target in plan.targets.items() if target.is_tied and name not in plan.saved]
    whole = [found[name].parameters["weight"] for name in tied if "weight" in found[name].parameters]
    for name in tied if whole else ():
        found[name].parameters.setdefault("weight", whole[0])


def _read(
    plan: Plan, module: str, own: _Found, kinds: Kinds, base_rows: torch.Tensor | None
) -> tuple[LoRAPair | None, Change]:
    target = plan.targets[module]

    def ready(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        cast = tensor.to(dtype)
        if not torch.isfinite(cast).all():
            raise not_finite(module, dtype)
        return cast.pin_memory() if kinds.pin else cast

    pair = bias = None
    if Role.A in own.by_role:
        a, b = own.by_role[Role.A], own.by_role[Role.B].float() * plan.scalings[module]
        pair = LoRAPair(ready(a, kinds.lora), ready(b, kinds.lora))
    if Role.BIAS in own.by_role:
        bias = ready(own.by_role[Role.BIAS].float() * plan.scalings[module], torch.float32)
    magnitude = own.by_role.get(Role.MAGNITUDE)
    parameters = dict(own.parameters)
    is_usual = not (target.is_embedding or target.is_head)
    rows = None
    if not is_usual:
        weight = parameters.pop("weight", None)
        if weight is not None:
            indices = _differing(weight.to(kinds.base), base_rows)
            if len(indices):
                rows = Rows(indices, ready(weight.index_select(0, indices), kinds.base))
        if module in plan.tokens:
            values = ready(own.by_role[Role.TOKENS], kinds.base)
            rows = _with_tokens(rows, torch.tensor(plan.tokens[module]), values)
    change = Change(
        parameters={name: ready(tensor, kinds.base) for name, tensor in parameters.items()},
        rows=rows,
        magnitude=None if magnitude is None else ready(magnitude, torch.float32),
        bias=bias,
        pair=None if is_usual else pair,
    )
    return pair if is_usual else None, change


def _differing(weight: torch.Tensor, base_rows: torch.Tensor | None) -> torch.Tensor:
    """Which rows of `weight` are not the base model's: int64, ascending."""
    differs = torch.ones(len(weight), dtype=torch.bool)
    if base_rows is not None:
        known = min(len(weight), len(base_rows))
        differs[:known] = fingerprints(weight[:known]) != base_rows[:known]
    return differs.nonzero().squeeze(1)


def _with_tokens(rows: Rows | None, tokens: torch.Tensor, values: torch.Tensor) -> Rows:
    """`rows` with the `values` of `tokens` in place of theirs."""
    if rows is not None:
        kept = ~torch.isin(rows.indices, tokens)
        tokens = torch.cat((rows.indices[kept], tokens))
        values = torch.cat((rows.values[kept], values))
    order = tokens.argsort()
    return Rows(tokens[order], values.index_select(0, order))
