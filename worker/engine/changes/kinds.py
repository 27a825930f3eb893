"""What adapters put in place of, or do to, parts of one kind of module: ready for the device.

Shapes: x and y are those of some tokens of one adapter, [n, in] and [n, out]. y is what the base model's own
module makes of x; all of these change it in place.
"""

import copy
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

import torch
from torch import nn

from worker.engine.adapters.adapter import Change, LoRAPair, Rows
from worker.engine.projections import Projection

_ROWS_AT_ONCE = 8192

Gains = MutableMapping[torch.Tensor, torch.Tensor]
"""What DoRA multiplies each row by, float32, by the magnitudes: both on the host."""


class ChangedLinear(NamedTuple):
    """A linear module: replaced, or its output scaled and shifted before LoRA is added."""

    weight: torch.Tensor | None
    """[in, out] if it is replaced."""
    gain: torch.Tensor | None
    """float32 [out]"""
    shift: torch.Tensor | None
    """float32 [out]; with a weight the bias."""

    def apply(self, x: torch.Tensor, y: torch.Tensor) -> None:
        if self.weight is not None:
            y.copy_(x.to(self.weight.dtype) @ self.weight)
        _scale(y, self.gain, self.shift)


def find_gains(
    gains: Gains, projection: Projection, changes: Mapping[int, tuple[Change, LoRAPair | None]]
) -> None:
    """Work out the gains that are not known of linear modules, by their number in `projection`.

    With DoRA a module computes `m / |W + BA| * (W + BA) x + bias`, the norm being that of each row
    (https://huggingface.co/papers/2402.09353). A row's is `sqrt(|w|^2 + 2 b (A w) + b (A A^T) b)`, so that
    the weights themselves need not be kept. One product multiplies them by all A's.
    """
    columns = projection.columns
    wanted = [
        (columns[number], change.magnitude, pair)
        for number, (change, pair) in changes.items()
        if pair is not None and change.magnitude is not None and change.magnitude not in gains
    ]
    if not wanted:
        return
    a = torch.cat([pair.a for *_, pair in wanted])
    along = projection.multiply(_moved(a, projection.device).to(projection.dtype))
    parts = torch.split(along, [pair.rank for *_, pair in wanted])
    for (own, magnitude, pair), part in zip(wanted, parts, strict=True):
        gains[magnitude] = _gain(magnitude, pair, projection.row_norms[own], part[:, own]).cpu()


def change_linear(
    projection: Projection,
    number: int,
    change: Change,
    pair: LoRAPair | None,
    *,
    is_transposed: bool,
    gain: torch.Tensor | None,
) -> tuple[ChangedLinear, LoRAPair | None]:
    """The module of this number in `projection`, changed, and the pair that is to be added to it.

    `is_transposed` says that the module keeps its weight as [in, out]. DoRA's gain goes into B.
    """
    columns = projection.columns[number]
    device = projection.device
    bias = _maybe(change.parameters.get("bias"), device)
    own_bias = None if projection.bias is None else projection.bias[columns].float()
    weight = _maybe(change.parameters.get("weight"), device)
    if weight is not None:
        weight = weight if is_transposed else weight.T.contiguous()
        return ChangedLinear(weight, None, own_bias if bias is None else bias.float()), pair
    if gain is not None:
        assert pair is not None
        gain = _moved(gain, device)
        pair = LoRAPair(pair.a, _scaled(_moved(pair.b, device), gain))
    return ChangedLinear(None, gain, _shift(own_bias, bias, _maybe(change.bias, device), gain)), pair


class ChangedHead(NamedTuple):
    """The module that makes the logits, for an adapter that may know more tokens than the base model."""

    width: int
    """Tokens that the adapter can write."""
    rows: Rows | None
    """The values as [features, n]."""
    row_bias: torch.Tensor | None
    gain: torch.Tensor | None
    """float32 [width], as is the shift."""
    shift: torch.Tensor | None
    pair: LoRAPair | None
    """Transposed: a is [in, r], b is [r, width]."""

    def apply(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Y is [n, width or more]; its columns that the base model does not have are zero."""
        if self.rows is not None:
            own = x.to(self.rows.values.dtype) @ self.rows.values
            y.index_copy_(
                1, self.rows.indices, (own if self.row_bias is None else own + self.row_bias).to(y.dtype)
            )
        y = y[:, : self.width]
        _scale(y, self.gain, self.shift)
        if self.pair is not None:
            y.add_((x.to(self.pair.a.dtype) @ self.pair.a) @ self.pair.b)


def change_head(projection: Projection, width: int, change: Change, gains: Gains) -> ChangedHead:
    """The head, changed; `projection` has it alone."""
    device = projection.device
    own_bias = None if projection.bias is None else _widened(projection.bias.float(), width)
    rows = None if change.rows is None else Rows(*(_moved(one, device) for one in change.rows))
    pair = None if change.pair is None else LoRAPair(*(_moved(one, device) for one in change.pair))
    gain = None
    if change.magnitude is not None:
        assert pair is not None
        if change.magnitude not in gains:
            gains[change.magnitude] = _head_gain(projection, change.magnitude, pair, rows).cpu()
        gain = _moved(gains[change.magnitude], device)
        pair = LoRAPair(pair.a, _scaled(pair.b, gain))
    bias = _maybe(change.parameters.get("bias"), device)
    return ChangedHead(
        width=width,
        rows=None if rows is None else Rows(rows.indices, rows.values.T.contiguous()),
        row_bias=None if rows is None or own_bias is None else own_bias[rows.indices],
        gain=gain,
        shift=_shift(own_bias, bias, _maybe(change.bias, device), gain),
        pair=None if pair is None else LoRAPair(pair.a.T.contiguous(), pair.b.T.contiguous()),
    )


def _head_gain(
    projection: Projection, magnitude: torch.Tensor, pair: LoRAPair, rows: Rows | None
) -> torch.Tensor:
    width = len(magnitude)
    norms = _widened(projection.row_norms, width)
    along = _widened(projection.multiply(pair.a.to(projection.dtype)), width)
    if rows is not None:
        norms[rows.indices] = torch.linalg.vector_norm(rows.values, dim=1, dtype=torch.float32)
        along[:, rows.indices] = pair.a.to(rows.values.dtype) @ rows.values.T
    return _gain(magnitude, pair, norms, along)


class ChangedEmbedding(NamedTuple):
    """A table of vectors by id."""

    scale: torch.Tensor | None
    """What the module multiplies its rows by."""
    rows: Rows | None
    gain: torch.Tensor | None
    """float32 [features]"""
    pair: LoRAPair | None
    """Transposed: a is [rows, r], b is [r, features]; the scale folded in."""

    def apply(self, ids: torch.Tensor, y: torch.Tensor) -> None:
        """`ids` is int64 [n]; where they are not the base model's own, y is anything."""
        if self.rows is not None:
            at = torch.searchsorted(self.rows.indices, ids).clamp_(max=len(self.rows.indices) - 1)
            is_there = (self.rows.indices.index_select(0, at) == ids).unsqueeze(1)
            own = self.rows.values.index_select(0, at).to(y.dtype)
            y.copy_(torch.where(is_there, own if self.scale is None else own * self.scale, y))
        _scale(y, self.gain, None)
        if self.pair is not None:
            y.add_(self.pair.a.index_select(0, ids) @ self.pair.b)


def change_embedding(module: nn.Embedding, change: Change, gains: Gains) -> ChangedEmbedding:
    """An embedding, changed. Its DoRA scales the columns of the table, not the rows, as PEFT's does."""
    weight = module.weight
    device = weight.device
    scale = getattr(module, "embed_scale", None)
    scale = None if scale is None else torch.as_tensor(scale).to(device, weight.dtype)
    rows = None if change.rows is None else Rows(*(_moved(one, device) for one in change.rows))
    pair = gain = None
    if change.pair is not None:
        a, b = (_moved(one, device).T.contiguous() for one in change.pair)
        if change.magnitude is not None:
            if change.magnitude not in gains:
                norms = _column_norms(weight, rows, LoRAPair(a, b)).cpu()
                gains[change.magnitude] = change.magnitude / norms
            gain = _moved(gains[change.magnitude], device)
            b = (b * gain).to(b.dtype)
        pair = LoRAPair(a, b if scale is None else (b * scale).to(b.dtype))
    return ChangedEmbedding(scale, rows, gain, pair)


def _column_norms(weight: torch.Tensor, rows: Rows | None, pair: LoRAPair) -> torch.Tensor:
    """Of the table with `rows` in it and `pair` added: float32 [features]."""
    squares = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for start in range(0, len(pair.a), _ROWS_AT_ONCE):
        a = pair.a[start : start + _ROWS_AT_ONCE]
        part = torch.zeros(len(a), weight.shape[1], device=weight.device)
        own = weight[start : start + len(a)]
        part[: len(own)] = own
        if rows is not None:
            first, last = torch.searchsorted(
                rows.indices, torch.tensor([start, start + len(a)]).to(weight.device)
            )
            part[rows.indices[first:last] - start] = rows.values[first:last].float()
        part += (a @ pair.b).float()
        squares += part.double().square().sum(0)
    return squares.sqrt().float()


def change_other(module: nn.Module, parameters: Mapping[str, torch.Tensor]) -> nn.Module:
    """A module like `module` with these in place of its own parameters; it shares the others."""
    changed = copy.copy(module)
    changed.__dict__.pop("forward", None)  # which may be ours
    own = {name: module.get_parameter(name) for name in parameters}
    fresh = {
        name: nn.Parameter(tensor.to(own[name].device, own[name].dtype), requires_grad=False)
        for name, tensor in parameters.items()
    }
    changed._parameters = {**module._parameters, **fresh}  # noqa: SLF001 (what a module has no public way to)
    return changed


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device; from pinned memory nobody waits for it."""
    return tensor.to(device, non_blocking=True)


def _maybe(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else _moved(tensor, device)


def _scale(y: torch.Tensor, gain: torch.Tensor | None, shift: torch.Tensor | None) -> None:
    """Y * gain + shift, in float32."""
    if gain is None and shift is None:
        return
    own = y.float()
    own = own if gain is None else own * gain
    y.copy_(own if shift is None else own + shift)


def _gain(magnitude: torch.Tensor, pair: LoRAPair, norms: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """What DoRA multiplies each row by: float32 [out]; `along` is A times the rows, [r, out]."""
    a, b, magnitude = (_moved(one, norms.device).double() for one in (*pair, magnitude))
    squares = norms.double().square() + 2 * (b * along.double().T).sum(1) + ((b @ (a @ a.T)) * b).sum(1)
    return (magnitude / squares.clamp_(min=0).sqrt()).float()


def _scaled(b: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return (b.float() * gain.unsqueeze(1)).to(b.dtype)


def _shift(
    own_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    added: torch.Tensor | None,
    gain: torch.Tensor | None,
) -> torch.Tensor | None:
    """What is added so that after `y * gain` the bias is `bias` (or the module's own) and `added`."""
    shift = None
    if bias is not None or (own_bias is not None and gain is not None):
        shift = own_bias if bias is None else bias.float()
        assert shift is not None
        if own_bias is not None:
            shift = shift - (own_bias if gain is None else own_bias * gain)
    if added is not None:
        added = added if gain is None else added * gain
        shift = added if shift is None else shift + added
    return shift


def _widened(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """The last dimension with zeros up to `width`; a copy."""
    return nn.functional.pad(tensor, (0, width - tensor.shape[-1])).clone()
