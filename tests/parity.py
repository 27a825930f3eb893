"""Which of PEFT's features are served on which architecture, tried out: `python -m tests.parity`.

For every architecture one tiny random base model, and for every feature an adapter that PEFT makes and saves.
All of them run side by side in mixed batches, base rows among them, greedily in float32. A cell says

    equal               each row says what PEFT's own model with that adapter alone says, token for token
    refused: reason     the adapter was refused when it was loaded
    n/a: reason         there is nothing to try: PEFT does not take it, or it would have no effect

and anything else is a failure: the exit code is 1.
"""

import argparse
import copy
import itertools
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model

from tests import tiny
from tests.engine.harness import Harness
from worker.errors import AdapterInvalid
from worker.jobs import AdapterKey, InferenceRequest, SamplingParams

NEW_TOKENS = 6
"""That an adapter brings, where it brings any."""
_ANSWER = 10
_PROMPTS = 3


class Shape(NamedTuple):
    """What the parts of an architecture are called."""

    architecture: str
    embedding: str
    norms: list[str]
    linear: str
    """One that is replaced as a whole."""
    has_biases: bool = False
    changes: Mapping[str, Any] = MappingProxyType({})

    @property
    def targets(self) -> list[str]:
        return tiny.ALL[self.architecture][2]

    @property
    def is_tied(self) -> bool:
        default = self.architecture == "gpt2"
        settings = tiny.ALL[self.architecture][1]
        return bool({**settings, **self.changes}.get("tie_word_embeddings", default))

    def has(self, what: str) -> bool:
        """`biases`, embeddings that are `tied`, a `layer` of several modules."""
        return {"biases": self.has_biases, "tied": self.is_tied, "layer": self.architecture != "opt"}[what]

    @property
    def common(self) -> dict[str, Any]:
        return {"fan_in_fan_out": True} if self.architecture == "gpt2" else {}


_TIED, _UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
_QUIET = {**_TIED, "initializer_range": 0.05}
"""Else what is tied says its last token again, whatever the adapter."""
SHAPES = {
    "llama": Shape("llama", "embed_tokens", ["norm"], "o_proj"),
    "llama-tied": Shape("llama", "embed_tokens", ["norm"], "o_proj", changes=_TIED),
    "qwen2": Shape("qwen2", "embed_tokens", ["norm"], "v_proj", has_biases=True),
    "qwen2-tied": Shape("qwen2", "embed_tokens", ["norm"], "v_proj", has_biases=True, changes=_TIED),
    "qwen3": Shape("qwen3", "embed_tokens", ["norm"], "o_proj"),
    "gemma2": Shape("gemma2", "embed_tokens", ["norm"], "o_proj"),
    "gemma3-tied": Shape("gemma3", "embed_tokens", ["norm"], "down_proj", changes=_QUIET),
    "phi3": Shape("phi3", "embed_tokens", ["norm"], "o_proj"),
    "gpt2": Shape("gpt2", "wte", ["ln_f", "ln_1"], "c_fc", has_biases=True),
    "opt": Shape("opt", "embed_tokens", ["final_layer_norm"], "fc1", has_biases=True, changes=_UNTIED),
    "gpt-neox": Shape("gpt-neox", "embed_in", ["final_layer_norm"], "dense", has_biases=True),
    "mixtral": Shape("mixtral", "embed_tokens", ["norm"], "o_proj"),
}  # fmt: skip


class Feature(NamedTuple):
    config: Callable[[Shape], dict[str, Any]]
    """Of PEFT."""
    brings: int = 0
    """Tokens."""
    needs: str = ""
    """`biases`, `tied` or `layer`."""


def _linear(shape: Shape) -> dict[str, Any]:
    return {"target_modules": shape.targets[:2]}


def _with(**settings: Any) -> Callable[[Shape], dict[str, Any]]:
    return lambda shape: {**_linear(shape), **settings}


def _saving(*parts: str) -> Callable[[Shape], dict[str, Any]]:
    def config(shape: Shape) -> dict[str, Any]:
        names = {
            "embedding": [shape.embedding],
            "head": ["lm_head"],
            "norms": shape.norms,
            "linear": [shape.linear],
            "layer": ["mlp"],
        }
        saved = [name for part in parts for name in names[part]]
        targets = [name for name in shape.targets if name not in saved]
        return {"target_modules": targets[:2], "modules_to_save": saved}

    return config


def _on(*parts: str, **settings: Any) -> Callable[[Shape], dict[str, Any]]:
    def config(shape: Shape) -> dict[str, Any]:
        names = {"embedding": shape.embedding, "head": "lm_head"}
        return {"target_modules": [shape.targets[0], *(names[part] for part in parts)], **settings}

    return config


def _tokens(*parts: str) -> Callable[[Shape], dict[str, Any]]:
    def config(shape: Shape) -> dict[str, Any]:
        names = {"embedding": shape.embedding, "head": "lm_head"}
        indices: Any = {names[part]: list(range(40, 90)) for part in parts} or list(range(20, 80))
        return {**_linear(shape), "trainable_token_indices": indices}

    return config


FEATURES = {
    "LoRA": Feature(_linear),
    "all-linear, rslora, patterns": Feature(
        lambda shape: {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {shape.targets[0]: 7},
            "alpha_pattern": {shape.targets[-1]: 3},
        }
    ),
    "use_dora": Feature(lambda shape: {"target_modules": shape.targets, "use_dora": True}),
    "bias lora_only": Feature(_with(bias="lora_only"), needs="biases"),
    "bias all": Feature(_with(bias="all"), needs="biases"),
    "bias all, use_dora": Feature(_with(bias="all", use_dora=True), needs="biases"),
    "lora_bias": Feature(_with(lora_bias=True)),
    "embedding": Feature(_on("embedding")),
    "lm_head": Feature(_on("head")),
    "embedding and lm_head": Feature(_on("embedding", "head")),
    "embedding and lm_head, use_dora": Feature(_on("embedding", "head", use_dora=True)),
    "embedding, ensure_weight_tying": Feature(_on("embedding", ensure_weight_tying=True), needs="tied"),
    "saved embedding": Feature(_saving("embedding")),
    "saved lm_head": Feature(_saving("head")),
    "saved norms": Feature(_saving("norms")),
    "saved linear": Feature(_saving("linear")),
    "saved embedding, lm_head, norms": Feature(_saving("embedding", "head", "norms")),
    "token indices": Feature(_tokens()),
    "token indices of both": Feature(_tokens("embedding", "head")),
    "token indices of lm_head": Feature(_tokens("head")),
    "saved layer": Feature(_saving("layer"), needs="layer"),
    "fewer tokens": Feature(_linear, brings=-NEW_TOKENS),
    "added tokens": Feature(_linear, brings=NEW_TOKENS),
    "added tokens, saved": Feature(_saving("embedding", "head"), brings=NEW_TOKENS),
    "added tokens, LoRA": Feature(_on("embedding", "head"), brings=NEW_TOKENS),
    "added tokens, indices": Feature(
        lambda shape: {**_linear(shape), "trainable_token_indices": list(range(272, 272 + NEW_TOKENS))},
        brings=NEW_TOKENS,
    ),
}  # fmt: skip


class Tuned(NamedTuple):
    """An adapter on disk, and PEFT's model of it."""

    folder: Path
    model: Any


def tune(base: Any, shape: Shape, feature: Feature, folder: Path, seed: int) -> Tuned:
    """Have PEFT make and save an adapter in which everything that it would train is changed.

    Raises what PEFT raises for what it does not do.
    """
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    if feature.brings:
        rows = model.get_input_embeddings().weight.shape[0] + feature.brings
        model.resize_token_embeddings(rows, mean_resizing=False)
        with torch.no_grad():
            for module in (model.get_input_embeddings(), model.get_output_embeddings()):
                fresh = module.weight[rows - max(0, feature.brings) :]
                fresh.copy_(3 * module.weight[: len(fresh)] + 0.1 * torch.randn_like(fresh))
    config = LoraConfig(
        task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 6, **shape.common, **feature.config(shape)}
    )
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_magnitude_vector" in name:
                tensor.mul_(1 + 0.3 * torch.randn_like(tensor))
            elif "lora_" in name and tensor.ndim > 1:
                tensor.normal_(0.0, 0.4 / tensor.shape[-1] ** 0.5)
                if "embedding_A" in name:
                    tensor.mul_(tensor.shape[-1] ** 0.5)
            elif tensor.requires_grad:
                tensor.add_(0.3 * max(float(tensor.std()), 0.3) * torch.randn_like(tensor))
    model.save_pretrained(folder)
    return Tuned(folder, model.eval())


@torch.inference_mode()
def says(model: Any, prompt: list[int], answer: list[int]) -> list[int]:
    """The likeliest token after the prompt, and after each token of the answer but the last."""
    tokens = [*prompt, *answer]
    logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    likeliest: list[int] = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
    return likeliest


def _reason(exc: Exception) -> str:
    return " ".join(str(exc).split())[:110]


def cells(
    shape: Shape, features: Iterable[str], folder: Path, device: str = "cpu"
) -> Iterator[tuple[str, str]]:
    """The cells of an architecture, by feature."""
    base = tiny.make_base(folder / "base", shape.architecture, **shape.changes)
    plain = tiny.load_base(base)
    harness = Harness(base, device=device, max_loras=4, max_num_seqs=9, max_num_batched_tokens=40)
    tuned: dict[str, Tuned] = {}
    keys: dict[str, AdapterKey | None] = {"base": None}
    for number, name in enumerate(features):
        feature = FEATURES[name]
        if feature.needs and not shape.has(feature.needs):
            yield name, f"n/a: no {feature.needs}"
            continue
        try:
            tuned[name] = tune(plain, shape, feature, folder / f"adapter{number}", number + 1)
        except (ValueError, TypeError, RuntimeError, AttributeError) as exc:
            yield name, f"n/a: PEFT does not: {_reason(exc)}"
            continue
        try:
            keys[name] = harness.adapter(tuned[name].folder)
        except AdapterInvalid as exc:
            yield name, f"refused: {_reason(exc).partition(' is invalid: ')[2]}"
    yield from _compare(harness, plain, tuned, keys)


def _compare(
    harness: Harness, plain: Any, tuned: dict[str, Tuned], keys: dict[str, AdapterKey | None]
) -> Iterator[tuple[str, str]]:
    rng = random.Random(0)
    prompts = [[rng.randrange(250) for _ in range(length)] for length in (2, 5, 17)[:_PROMPTS]]
    order = list(itertools.product(keys, range(len(prompts))))
    rng.shuffle(order)
    params = SamplingParams(max_new_tokens=_ANSWER, ignore_eos=True)
    done = harness.run(
        InferenceRequest(id=f"{name}/{row}", prompt=tuple(prompts[row]), adapter=keys[name], params=params)
        for name, row in order
    )
    unchanged = [list(done[f"base/{row}"].token_ids) for row in range(len(prompts))]
    for name in keys:
        model = plain if name == "base" else tuned[name].model
        answers = [list(done[f"{name}/{row}"].token_ids) for row in range(len(prompts))]
        expected = [says(model, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        wrong = sum(own != other for own, other in zip(answers, expected, strict=True))
        if any(done[f"{name}/{row}"].failure for row in range(len(prompts))):
            yield name, f"FAILED: {done[f'{name}/0'].failure}"
        elif wrong:
            yield name, f"DIFFERS in {wrong} of {len(prompts)} rows"
        elif name != "base" and answers == unchanged:
            yield name, "NO EFFECT: the adapter does not change what the base model says"
        elif (
            name != "base"
            and FEATURES[name].brings > 0
            and max(map(max, answers)) < len(plain.get_input_embeddings().weight)
        ):
            yield name, "NO NEW TOKEN was generated"
        else:
            yield name, "equal"


def is_right(cell: str) -> bool:
    return cell == "equal" or cell.startswith(("refused: ", "n/a: "))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__.partition("\n")[0])
    parser.add_argument("--architecture", action="append", choices=SHAPES, help="these only")
    parser.add_argument("--feature", action="append", choices=FEATURES, help="these only")
    args = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # of PEFT's, about what is tried here on purpose
    is_all_right = True
    for name in args.architecture or SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            for feature, cell in cells(SHAPES[name], args.feature or FEATURES, Path(folder)):
                is_all_right &= is_right(cell)
                print(f"{name:12} {feature:34} {cell}", flush=True)
    return 0 if is_all_right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
