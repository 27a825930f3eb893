"""Loads a base model and checks that it is one this engine serves right."""

import logging
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from worker.engine.parallel.cuts import plan_cuts
from worker.engine.products import has_bfloat16
from worker.engine.rope import RopeScaling
from worker.engine.tokenizer import Tokenizer
from worker.errors import ModelError

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LENGTH_BOUND_ROPES = frozenset({"dynamic", "longrope"})
"""Rotary scalings that change with the longest sequence in the batch: right only below the length
the model was first trained for, where they change nothing."""


class BaseModel(NamedTuple):
    model: PreTrainedModel
    tokenizer: Tokenizer
    eos_token_ids: frozenset[int]
    max_model_len: int
    """Tokens of prompt and answer together, of rows whose adapter has the largest factor of `rope`."""
    device: torch.device
    dtype: torch.dtype
    rope: RopeScaling = RopeScaling()


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N`. Raises ModelError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device {name} is not there: {torch.cuda.device_count()} CUDA devices were found")
    return device


def degree_of(asked: int, device: torch.device) -> int:
    """How many devices like this one share the model: 0 asks for all GPUs."""
    return asked or (torch.cuda.device_count() if device.type == "cuda" else 1)


def resolve_dtype(name: str, device: torch.device, config: PretrainedConfig) -> torch.dtype:
    """`float32`, `bfloat16`, `float16`, or `auto`.

    `auto` is the checkpoint's own type on a GPU. On a CPU it is bfloat16 if that is the checkpoint's type
    and the processor has instructions for it, and float32 otherwise.
    """
    if name != "auto":
        return _DTYPES[name]
    own = getattr(config, "dtype", None)
    if device.type == "cuda":
        return own if isinstance(own, torch.dtype) and own in _DTYPES.values() else torch.float32
    return torch.bfloat16 if own == torch.bfloat16 and has_bfloat16(device) else torch.float32


def free_memory(device: torch.device) -> int:
    """Bytes that nobody uses on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def load_base_model(
    path: str | Path,
    *,
    device: torch.device,
    dtype: str = "auto",
    max_model_len: int | None = None,
    trust_remote_code: bool = False,
    rope_factors: tuple[float, ...] = (),
    degree: int = 1,
) -> BaseModel:
    """The model and tokenizer in folder `path` (or of that hub id), ready for inference on `device`.

    With `rope_factors` rows of adapters that ask for one of them may be that much longer. If `degree` devices
    are to share it, it stays on the host, whole.

    Raises ModelError if it cannot be read, is no decoder-only language model, or attends in a way that
    transformers' attention interface does not reach.
    """
    with _readable_errors(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        chosen = resolve_dtype(dtype, device, config)
        outline = _outline(config, trust_remote_code)
        cut = plan_cuts(outline, degree) if degree > 1 else {}
        _check_memory(outline, chosen, device, cut, degree)
        if degree > 1 and device.type != "cpu":
            _check_memory(outline, chosen, torch.device("cpu"))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=chosen, trust_remote_code=trust_remote_code, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    model, found = loaded
    if found["missing_keys"]:  # they would be random
        missing = ", ".join(sorted(found["missing_keys"]))
        raise ModelError(f"the base model at {path} lacks weights: {missing}")
    _check_supported(model)
    model.requires_grad_(False).train(False)
    if degree == 1:
        model.to(device)
    rope = RopeScaling(rope_factors, _native_len(config.get_text_config(), max_model_len))
    return BaseModel(
        model=model,
        tokenizer=Tokenizer(tokenizer),
        eos_token_ids=_eos_token_ids(model, tokenizer.eos_token_id),
        max_model_len=_model_len(rope, max_model_len),
        device=device,
        dtype=chosen,
        rope=rope,
    )


def load_outline(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model in folder `path` (or of that hub id) without its weights: modules and sizes, on `meta`.

    It takes a part of a second, whatever the model's size. Raises ModelError if it cannot be read.
    """
    with _readable_errors(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        return _outline(config, trust_remote_code)


@contextmanager
def _readable_errors(path: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as exc:
        reason = str(exc).partition("\n")[0][:500]  # transformers may list all that it knows
        raise ModelError(f"the base model at {path} cannot be loaded: {reason}") from exc


def _outline(config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=trust_remote_code
        )
    return model


def _check_memory(
    outline: PreTrainedModel,
    dtype: torch.dtype,
    device: torch.device,
    cut: Container[str] = (),
    degree: int = 1,
) -> None:
    """Raise ModelError if the weights alone are more than what is free.

    The modules in `cut` are divided among `degree` GPUs; on the CPU all of them take from the same memory.
    """
    parts = degree if device.type == "cuda" else 1
    needed = dtype.itemsize * sum(
        parameter.numel() // (parts if name.rpartition(".")[0] in cut else 1)
        for name, parameter in outline.named_parameters()
    )
    free = free_memory(device)
    if needed > free:
        raise ModelError(
            f"the base model's weights need {needed >> 20} MiB in {dtype}, "
            f"{free >> 20} MiB are free on {device}"
        )


def _check_supported(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ModelError(f"{name} is an encoder-decoder model, only decoder-only models are supported")
    if not getattr(model, "_supports_attention_backend", False):
        raise ModelError(f"{name} does not use transformers' attention interface, which this engine needs")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ModelError(f"{name} is quantised, which is not supported")
    config = model.config.get_text_config()
    if getattr(config, "attn_temperature_tuning", False) and not all(getattr(config, "no_rope_layers", ())):
        # Llama 4 counts positions by itself there, as if all tokens of a step were of one row.
        raise ModelError(f"{name} has attn_temperature_tuning, which is not supported")
    layer_types = set(getattr(config, "layer_types", None) or ())
    strange = layer_types - {"full_attention", "sliding_attention"}
    if strange:
        raise ModelError(f"{name} has layers of type {', '.join(sorted(strange))}, which are not supported")


def _eos_token_ids(model: PreTrainedModel, of_tokenizer: int | None) -> frozenset[int]:
    generation = model.generation_config
    ids = generation.eos_token_id if generation is not None else None
    if ids is None:
        ids = of_tokenizer
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


def _native_len(config: PretrainedConfig, wanted: int | None) -> int:
    """What the model was made for; `wanted` if it does not say."""
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for own in [rope] if "rope_type" in rope else rope.values():
        if isinstance(own, dict) and own.get("rope_type") in _LENGTH_BOUND_ROPES:
            limit = own.get("original_max_position_embeddings") or limit
    return int(limit or wanted or 2048)


def _model_len(rope: RopeScaling, wanted: int | None) -> int:
    limit = rope.max_len(rope.max_factor)
    if wanted is not None and wanted > limit:
        times = f" times {rope.max_factor:g}" if rope.factors else ""
        raise ModelError(f"max_model_len is {wanted}, the base model's limit is {rope.native_len}{times}")
    return wanted or limit
