"""y = x @ weight.T + bias for weights that never change, as fast as the device makes it."""

from typing import Protocol

import torch
from torch.nn import functional


class Product(Protocol):
    @property
    def weight(self) -> torch.Tensor:
        """What it was made of, [out, in]; perhaps a copy that is made now, and in a wider type."""

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        """[..., in] -> [..., out], contiguous; any floating type that the product was made for."""

    def plus(self, delta: torch.Tensor, spare: "Product | None") -> "Product":
        """A product over the weight and `delta` [out, in], with the same bias; this one stays as it is.

        `spare` came of an earlier call and is used no more: its memory may be.
        """


_ONEDNN = torch.ops.mkldnn
"""The operators that torch's own compiler packs weights with; in torch since 2.0, and no public name."""

_TYPICAL_ROWS = 32
"""Rows for which a packed layout is chosen: a decode step. Other numbers are right too."""


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 faster than float32; for a CPU, by its instructions."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    known = torch.cpu.get_capabilities()
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"))


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type in which `device` multiplies `dtype`: float32 for halves on a CPU without such a way."""
    if device.type != "cpu" or (dtype == torch.bfloat16 and has_bfloat16(device)):
        return dtype
    return torch.float32


def make_product(weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[Product, bool]:
    """A product over `weight` [out, in], and whether it still needs that tensor.

    On a CPU the weight is packed once into the blocks that oneDNN multiplies by: at 16 rows this is
    1.2 to 2.9 times as fast as the plain product (`python -m tests.benchmarks.products`). Half precision
    on a processor without instructions for it is packed as float32: see `product_dtype`.
    """
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return _Plain(weight, bias), True
    dtype = product_dtype(weight.dtype, weight.device)
    return _Packed(weight.to(dtype), None if bias is None else bias.to(dtype)), False


class _Plain:
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self._bias = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self._bias)

    def plus(self, delta: torch.Tensor, spare: Product | None) -> Product:
        weight = spare.weight if isinstance(spare, _Plain) else torch.empty_like(self.weight)
        torch.add(self.weight, delta.to(self.weight.dtype), out=weight)
        return _Plain(weight, self._bias)


class _Packed:
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._dtype = weight.dtype
        self._weight = _ONEDNN._reorder_linear_weight(weight.contiguous(), _TYPICAL_ROWS)  # noqa: SLF001
        self._bias = bias

    @property
    def weight(self) -> torch.Tensor:
        # Unpacked it is what was packed, to the last bit.
        weight: torch.Tensor = self._weight.to_dense().to(self._dtype)
        return weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        own = x.to(self._dtype).contiguous()
        y: torch.Tensor = _ONEDNN._linear_pointwise(own, self._weight, self._bias, "none", [], "")  # noqa: SLF001
        return y.to(x.dtype)

    def plus(self, delta: torch.Tensor, spare: Product | None) -> Product:
        return _Packed(self.weight + delta.to(self._dtype), self._bias)
