"""What adapters put in place of, or do to, parts of one kind of module: ready for the device.

Shapes: x and y are those of some tokens of one adapter, [n, in] and [n, out]. y is what the base model's own
module makes of x; all of these change it in place.
"""

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from worker.engine.adapter import Change, LoRAPair, Rows
from worker.engine.projections import Projection

_ROWS_AT_ONCE = 8192


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


def change_linear(
    projection: Projection, number: int, is_transposed: bool, change: Change, pair: LoRAPair | None
) -> tuple[ChangedLinear, LoRAPair | None]:
    """The module of this number in `projection`, changed, and the pair that is to be added to it.

    `is_transposed` says that the module keeps its weight as [in, out].

    With DoRA a module computes `m / |W + BA| * (W + BA) x + bias`, the norm being that of each row
    (https://huggingface.co/papers/2402.09353). A row's is `sqrt(|w|^2 + 2 b (A w) + b (A A^T) b)`, so that
    the weights themselves need not be kept. The factor goes into B.
    """
    columns = projection.columns[number]
    device = projection.device
    bias = _moved(change.parameters.get("bias"), device)
    own_bias = None if projection.bias is None else projection.bias[columns].float()
    weight = _moved(change.parameters.get("weight"), device)
    if weight is not None:
        weight = weight if is_transposed else weight.T.contiguous()
        return ChangedLinear(weight, None, own_bias if bias is None else bias.float()), pair
    gain = None
    if change.magnitude is not None:
        assert pair is not None
        a = pair.a.to(device)
        along = projection.multiply(a.to(projection.dtype))[:, columns]
        gain = _gain(change.magnitude.to(device), pair, projection.row_norms[columns], along)
        pair = LoRAPair(pair.a, _scaled(pair.b.to(device), gain))
    return ChangedLinear(None, gain, _shift(own_bias, bias, change.bias, gain, device)), pair


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


def change_head(projection: Projection, width: int, change: Change) -> ChangedHead:
    """The head, changed; `projection` has it alone."""
    device = projection.device
    own_bias = None if projection.bias is None else _widened(projection.bias.float(), width)
    rows = None if change.rows is None else Rows(*(one.to(device) for one in change.rows))
    pair = None if change.pair is None else LoRAPair(*(one.to(device) for one in change.pair))
    gain = None
    if change.magnitude is not None:
        assert pair is not None
        norms = _widened(projection.row_norms, width)
        along = _widened(projection.multiply(pair.a.to(projection.dtype)), width)
        if rows is not None:
            norms[rows.indices] = torch.linalg.vector_norm(rows.values, dim=1, dtype=torch.float32)
            along[:, rows.indices] = pair.a.to(rows.values.dtype) @ rows.values.T
        gain = _gain(change.magnitude.to(device), pair, norms, along)
        pair = LoRAPair(pair.a, _scaled(pair.b, gain))
    bias = _moved(change.parameters.get("bias"), device)
    return ChangedHead(
        width=width,
        rows=None if rows is None else Rows(rows.indices, rows.values.T.contiguous()),
        row_bias=None if rows is None or own_bias is None else own_bias[rows.indices],
        gain=gain,
        shift=_shift(own_bias, bias, change.bias, gain, device),
        pair=None if pair is None else LoRAPair(pair.a.T.contiguous(), pair.b.T.contiguous()),
    )


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


def change_embedding(module: nn.Embedding, change: Change) -> ChangedEmbedding:
    """An embedding, changed. Its DoRA scales the columns of the table, not the rows, as PEFT's does."""
    weight = module.weight
    device = weight.device
    scale = getattr(module, "embed_scale", None)
    scale = None if scale is None else torch.as_tensor(scale).to(device, weight.dtype)
    rows = None if change.rows is None else Rows(*(one.to(device) for one in change.rows))
    pair = gain = None
    if change.pair is not None:
        a, b = change.pair.a.to(device).T.contiguous(), change.pair.b.to(device).T.contiguous()
        if change.magnitude is not None:
            gain = change.magnitude.to(device) / _column_norms(weight, rows, LoRAPair(a, b))
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


def _moved(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)


def _scale(y: torch.Tensor, gain: torch.Tensor | None, shift: torch.Tensor | None) -> None:
    """Y * gain + shift, in float32."""
    if gain is None and shift is None:
        return
    own = y.float()
    own = own if gain is None else own * gain
    y.copy_(own if shift is None else own + shift)


def _gain(magnitude: torch.Tensor, pair: LoRAPair, norms: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """What DoRA multiplies each row by: float32 [out]; `along` is A times the rows, [r, out]."""
    a, b = pair.a.to(magnitude.device).double(), pair.b.to(magnitude.device).double()
    squares = norms.double().square() + 2 * (b * along.double().T).sum(1) + ((b @ (a @ a.T)) * b).sum(1)
    return (magnitude.double() / squares.clamp_(min=0).sqrt()).float()


def _scaled(b: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return (b.float() * gain.unsqueeze(1)).to(b.dtype)


def _shift(
    own_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    added: torch.Tensor | None,
    gain: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor | None:
    """What is added so that after `y * gain` the bias is `bias` (or the module's own) and `added`."""
    before = 0.0 if own_bias is None else own_bias if gain is None else own_bias * gain
    after = own_bias if bias is None else bias.float()
    shift = torch.as_tensor(0.0 if after is None else after) - torch.as_tensor(before)
    if added is not None:
        shift = shift.to(device) + added.to(device) * (1.0 if gain is None else gain)
    return shift if shift.ndim and bool(shift.any()) else None


def _widened(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """The last dimension with zeros up to `width`; a copy."""
    return nn.functional.pad(tensor, (0, width - tensor.shape[-1])).clone()
