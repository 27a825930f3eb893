"""Linear scaling of rotary positions, by row: what LongLoRA-like adapters need, which were trained with it.

A model that is scaled by a factor sees the position p as p / factor, so a text may be that much longer than
those the base model was trained on. Rows of one batch may differ in it, since every token has its own
position: transformers' `{"rope_type": "linear", "factor": f}` divides the frequencies instead, and both are
multiplied with each other before anything else happens to them.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import torch
from torch import nn
from transformers import PretrainedConfig

from worker.engine.transfer import to_device
from worker.errors import AdapterInvalid, ModelError

_FREQUENCIES = "inv_freq"


class RopeScaling(msgspec.Struct, frozen=True):
    """What adapters may ask for. `factors` empty: none of them may."""

    factors: tuple[float, ...] = ()
    native_len: int = 0
    """Tokens that the base model was made for, which a factor multiplies."""

    @property
    def max_factor(self) -> float:
        return max(self.factors, default=1.0)

    def max_len(self, factor: float = 1.0) -> int:
        """Most tokens of a row whose adapter has `factor`."""
        return int(self.native_len * factor)


class _Scaling(msgspec.Struct):
    factor: float = 1.0
    rope_type: str | None = None
    type: str | None = None

    @property
    def kind(self) -> str:
        return self.rope_type or self.type or "linear"


class _Asked(msgspec.Struct):
    """What of an adapter's configuration is about positions."""

    context_length: int | None = None
    """LongLoRA's and vLLM's: the length that it was trained for."""
    rope_scaling: _Scaling | None = None
    """Transformers' own, of the model that it was trained on."""


ASKS = frozenset(_Asked.__struct_fields__)


def read_factor(raw: dict[str, Any], scaling: RopeScaling) -> float:
    """The factor that an adapter's configuration asks for; 1 if it asks for none.

    Raises AdapterInvalid for one that rows may not have here.
    """
    try:
        asked = msgspec.convert({name: raw[name] for name in ASKS & raw.keys()}, _Asked)
    except msgspec.ValidationError as exc:
        raise AdapterInvalid(f"its rope scaling cannot be read: {exc}") from exc
    factor, said = 1.0, ""
    if asked.rope_scaling is not None:
        said = f"rope_scaling {json.dumps(raw['rope_scaling'])}"
        if asked.rope_scaling.kind not in {"linear", "default"}:
            raise AdapterInvalid(f"{said} is not linear, which is all that is supported")
        factor = asked.rope_scaling.factor if asked.rope_scaling.kind == "linear" else 1.0
    elif asked.context_length is not None and scaling.native_len:
        said = f"context_length {asked.context_length} of {scaling.native_len} tokens"
        factor = float(max(1, -(-asked.context_length // scaling.native_len)))
    if factor != 1.0 and factor not in scaling.factors:
        allowed = ", ".join(f"{one:g}" for one in scaling.factors) or "none"
        raise AdapterInvalid(
            f"{said} needs the factor {factor:g}; long_lora_scaling_factors has {allowed}", "config"
        )
    return factor


def check_scalable(config: PretrainedConfig, name: str) -> None:
    """Raise ModelError for a model whose positions a factor does not scale, or not alone."""
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type")
    if kind is None:
        what = "differ by layer" if any(isinstance(own, dict) for own in rope.values()) else "are not rotary"
        raise ModelError(f"{name} cannot have long_lora_scaling_factors: its positions {what}")
    if kind != "default":
        raise ModelError(
            f"{name} cannot have long_lora_scaling_factors: its rope_type is {kind}, default is needed"
        )


@contextmanager
def scaled(model: nn.Module, factor: float) -> Iterator[None]:
    """The model as transformers makes it with linear scaling by `factor`, to the end of the block."""
    found = [module for module in model.modules() if hasattr(module, _FREQUENCIES)]
    if not found:
        raise ModelError(f"{type(model).__name__} keeps its rotary frequencies elsewhere than in inv_freq")
    own = [getattr(module, _FREQUENCIES) for module in found]
    try:
        for module, frequencies in zip(found, own, strict=True):
            setattr(module, _FREQUENCIES, frequencies / factor)
        yield
    finally:
        for module, frequencies in zip(found, own, strict=True):
            setattr(module, _FREQUENCIES, frequencies)


def scaled_positions(
    positions: torch.Tensor, factors: Sequence[float], counts: Sequence[int]
) -> torch.Tensor:
    """Positions [T] of rows with so many tokens each, divided by each row's factor; float32.

    Whole numbers are exact in it up to 16,777,216.
    """
    if all(factor == 1.0 for factor in factors):
        return positions.to(torch.float32)
    own = torch.repeat_interleave(torch.tensor(factors, dtype=torch.float32), torch.tensor(counts))
    return positions.to(torch.float32) / to_device(own, positions.device)
