"""An engine over a folder of base model and some adapters, driven to the end of its work."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from worker.engine.adapters.loader import AdapterLoader
from worker.engine.adapters.tokenizers import AdapterTokenizers
from worker.engine.base_model import BaseModel, load_base_model
from worker.engine.cache_size import CacheShape
from worker.engine.engine import Engine, StepStats
from worker.engine.kernels.tilings import Tuner
from worker.engine.kv_cache import Leftover
from worker.engine.limits import EngineLimits
from worker.engine.lora_store import LoRAStore
from worker.engine.merging import LoRAMode
from worker.engine.model_runner import ModelRunner
from worker.engine.products import product_dtype
from worker.jobs import AdapterKey, Completion, InferenceRequest


class Harness:
    def __init__(
        self,
        base: Path,
        *,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        max_loras: int = 4,
        max_lora_rank: int = 64,
        cache_shape: CacheShape | None = None,
        max_model_len: int | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        lora_dtype: torch.dtype | None = None,
        memory_share: float | None = None,
        prefix_reuse: bool = True,
        kernels: bool | None = None,
        tuner: Tuner | None = None,
        look_ahead: bool | None = None,
        rope_factors: tuple[float, ...] = (),
        lora_mode: LoRAMode = LoRAMode.UNMERGED,
        lora_extra_vocab_size: int = 256,
    ) -> None:

        def limits_for(base: BaseModel) -> EngineLimits:
            return EngineLimits(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_loras=max_loras,
                max_lora_rank=max_lora_rank,
                lora_dtype=lora_dtype or product_dtype(base.dtype, base.device),
                lora_mode=lora_mode,
                lora_extra_vocab_size=lora_extra_vocab_size,
            )

        self.base, self.runner = self.make(
            lambda **options: load_base_model(
                base,
                device=torch.device(device),
                dtype=dtype,
                max_model_len=max_model_len,
                rope_factors=rope_factors,
                **options,
            ),
            lambda base, **options: ModelRunner(
                base,
                limits_for(base),
                cache_shape=cache_shape,
                memory_share=memory_share,
                kernels=kernels,
                **{"tuner": tuner, **options},
            ),
        )
        self._options = {
            "prefix_reuse": prefix_reuse,
            "look_ahead": device != "cpu" if look_ahead is None else look_ahead,
        }
        self._start()

    def make(
        self, load: Callable[..., BaseModel], build: Callable[..., ModelRunner]
    ) -> tuple[BaseModel, ModelRunner]:
        """The model and what runs it; `load` and `build` take more options."""
        base = load()
        return base, build(base)

    def _start(self) -> None:
        limits = self.runner.limits
        self.store = LoRAStore(
            AdapterLoader(
                self.runner.targets,
                max_lora_rank=limits.max_lora_rank,
                dtype=limits.lora_dtype,
                pin=self.base.device.type == "cuda",
                rope=self.base.rope,
                lora_extra_vocab_size=limits.lora_extra_vocab_size,
                least_tokens=self.base.tokenizer.num_tokens,
                base_dtype=self.base.dtype,
                base_rows=self.runner.base_rows,
                tokenizers=AdapterTokenizers(self.base.tokenizer).read,
                is_shared=self.runner.is_shared,
            ),
            max_cpu_loras=64,
        )
        self.engine = Engine(
            self.runner,
            self.base,
            self.store.weights,
            **self._options,
        )
        self.stats: list[StepStats] = []

    def renew(self) -> "Harness":
        """Begin anew, on the CPU: model, cache and slots stay, but empty, and the rest is made again."""
        self.base.model.get_input_embeddings()._forward_hooks.clear()
        for slot in range(self.runner.limits.max_loras):
            self.runner._executor.lora.clear(slot)
            self.runner._executor.changes.clear(slot)
        blocks, size = self.runner.cache_shape
        self.runner.scrub(Leftover(block, 0, size) for block in range(blocks))
        self._start()
        return self

    def adapter(self, folder: Path, version: str = "1") -> AdapterKey:
        key = AdapterKey(folder.name, version)
        assert self.store.reserve(key)
        self.store.load(key, folder)
        return key

    def run(self, requests: Iterable[InferenceRequest]) -> dict[str, Completion]:
        for request in requests:
            self.engine.add(request)
        return self.drain()

    def drain(self) -> dict[str, Completion]:
        completions = {}
        while self.engine.has_work:
            ended, stats = self.engine.step()
            self.engine.check_integrity()
            self.stats.append(stats)
            completions.update({completion.request_id: completion for completion in ended})
        return completions
