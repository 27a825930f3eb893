"""The proof, on a short example, that the packed way computes what a model computes by itself."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from worker.engine.attention import PackedAttention
from worker.engine.base_model import BaseModel
from worker.engine.discovery import foresee
from worker.engine.executor import Executor, PackedRow
from worker.engine.fingerprints import fingerprints
from worker.engine.rope import check_scalable, scaled
from worker.errors import ModelError

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Relative difference of logits, packed against plain, that rounding explains."""
_LENGTH = 12


class Probe:
    """Two short rows of tokens."""

    def __init__(self, base: BaseModel) -> None:
        embeddings: Any = base.model.get_input_embeddings()
        self.vocab_size: int = embeddings.weight.shape[0]
        """Token ids from this on are unknown to the model."""
        self.length = min(_LENGTH, base.max_model_len)
        generator = torch.Generator().manual_seed(0)
        shape = (2, self.length)
        self.prompts: list[list[int]] = torch.randint(self.vocab_size, shape, generator=generator).tolist()

    def steps(self, row: int) -> Iterator[tuple[int, list[int]]]:
        """Offset and tokens of each pass: a prefill, a chunk, then one by one."""
        first, second = self.length // 3, 2 * self.length // 3
        for start, stop in itertools.pairwise(sorted({0, first, *range(second, self.length + 1)})):
            yield start, self.prompts[row][start:stop]


class Expected(NamedTuple):
    """What only a whole model tells, before anything of it is replaced."""

    logits: dict[float, torch.Tensor]
    """Of the probe, float32 [2, length, vocabulary], by each factor that positions may be scaled with."""
    base_rows: dict[str, torch.Tensor]
    """Of the weights that have a row for each token, by module; see `fingerprints`. For adapters alone."""

    @property
    def num_logits(self) -> int:
        """Token ids from this on are never generated."""
        return self.logits[1.0].shape[-1]


@torch.inference_mode()
def expect(base: BaseModel, *, adapters: bool = True) -> Expected:
    """Ask a whole model, which takes a pass for each factor; `adapters` is whether it may have any.

    Raises ModelError if it cannot be served.
    """
    model, factors = base.model, base.rope.factors
    if factors:
        check_scalable(model.config.get_text_config(), type(model).__name__)
    prompts = torch.tensor(Probe(base).prompts, device=model.device)
    found = {}
    with sound(model):
        for factor in (1.0, *factors):
            with nullcontext() if factor == 1.0 else scaled(model, factor):
                found[factor] = model(input_ids=prompts, use_cache=False).logits.float()
    return Expected(found, _fingerprints(model) if adapters else {})


def check_packed(
    base: BaseModel,
    executor: Executor,
    attention: PackedAttention,
    block_size: int,
    expected: torch.Tensor | None,
) -> None:
    """Put each row through in chunks, then token by token. Raises ModelError if logits are not as `expected`.

    None on a rank that takes its part, and leaves it to rank 0 to judge.
    """
    probe = Probe(base)
    blocks = list(range(-(-probe.length // block_size)))
    worst = 0.0
    for row in range(len(probe.prompts)):
        got = []
        for offset, tokens in probe.steps(row):
            logits = executor.run([PackedRow(blocks, offset, tokens, len(tokens))])
            got.append(logits.clone())  # the next run may overwrite them
        if expected is not None:
            own = expected[row]
            worst = max(worst, float((torch.cat(got).float().to(own.device) - own).norm() / own.norm()))
        for block in blocks:
            attention.scrub(block, 0, min(block_size, probe.length))
    limit = _TOLERANCE[base.dtype]
    if not worst <= limit:
        raise ModelError(
            f"{type(base.model).__name__} cannot be served: packed logits differ from its own by "
            f"{worst:.2g} of their size, the limit is {limit:.2g} for {base.dtype}"
        )


@contextmanager
def sound(model: PreTrainedModel) -> Iterator[None]:
    """Raise ModelError for whatever a model's own code makes of the example."""
    try:
        yield
    except (ModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as exc:
        name = type(model).__name__
        raise ModelError(f"{name} cannot be served: a short example ended with {exc!r}") from exc


def _fingerprints(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    names = [name for name, target in foresee(model).items() if target.has_tokens]
    weights = {name: model.get_parameter(f"{name}.weight") for name in names}
    known = {weight.data_ptr(): weight for weight in weights.values()}  # what is tied is looked at once
    found = {pointer: fingerprints(weight) for pointer, weight in known.items()}
    return {name: found[weight.data_ptr()] for name, weight in weights.items()}
