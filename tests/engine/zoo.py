"""Base models of every architecture with adapters of theirs, each made once, and what PEFT makes of them."""

import copy
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from tests import tiny


class Kind:
    """One base model, in the folder `base`, and its adapters."""

    def __init__(self, folder: Path, architecture: str) -> None:
        self.base = tiny.make_base(folder / "base", architecture)
        self._folder = folder
        self._architecture = architecture

    @property
    def adapters(self) -> list[Path]:
        """Folders; ranks, scalings, patterns, targets and layers differ from one to the other."""
        return [self._folder / f"adapter{number}" for number in range(len(self._tuned))]

    @torch.inference_mode()
    def logits(self, adapter: int | None, tokens: Sequence[int]) -> torch.Tensor:
        """[tokens, vocabulary] by PEFT's model with the adapter of this number, or by the plain model."""
        model = self._plain if adapter is None else self._tuned[adapter]
        logits: torch.Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        return logits

    def greedy(self, adapter: int | None, prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
        """The likeliest token after the prompt, and after each token of the answer but the last.

        This is the answer if and only if it is what this model itself would say, taking the likeliest token.
        """
        tokens = [*prompt, *answer]
        likeliest: list[int] = self.logits(adapter, tokens)[len(prompt) - 1 : -1].argmax(-1).tolist()
        return likeliest

    @cached_property
    def _plain(self) -> Any:
        return tiny.load_base(self.base)

    @cached_property
    def _tuned(self) -> list[Any]:
        """PEFT's models, which are saved as the adapters."""
        every = tiny.ARCHITECTURES[self._architecture][2]
        shapes: list[dict[str, Any]] = [
            {"r": 4, "lora_alpha": 8, "target_modules": every[:2]},
            {"r": 8, "lora_alpha": 4, "target_modules": every, "use_rslora": True},
            {"r": 2, "lora_alpha": 16, "target_modules": "all-linear", "layers_to_transform": None},
            {"r": 3, "lora_alpha": 6, "target_modules": every, "layers_to_transform": [0, 2]},
            {
                "r": 5,
                "lora_alpha": 5,
                "target_modules": every,
                "rank_pattern": {every[0]: 7, rf".*\.1\..*{every[-1]}": 1},
                "alpha_pattern": {every[1]: 21},
            },
            {"r": 6, "lora_alpha": 12, "target_modules": rf".*\.[01]\..*\.({every[0]}|{every[-1]})"},
        ]
        fan = {"fan_in_fan_out": True} if self._architecture == "gpt2" else {}
        return [self._save(number, {**shape, **fan}) for number, shape in enumerate(shapes)]

    def _save(self, number: int, config: dict[str, Any]) -> Any:
        torch.manual_seed(number + 1)
        model = get_peft_model(copy.deepcopy(self._plain), LoraConfig(task_type="CAUSAL_LM", **config))
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                if "lora_" in name:
                    tensor.normal_(0.0, 0.4 / tensor.shape[-1] ** 0.5)
        model.save_pretrained(self._folder / f"adapter{number}")
        return model.eval()
