"""Greedy fp32 output of a mixed batch is PEFT's own, token for token."""

import itertools
import random
from pathlib import Path

import pytest

from tests import tiny
from tests.engine.harness import Harness
from worker.engine.model_runner import CacheShape
from worker.jobs import InferenceRequest, SamplingParams


def _prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.choice([1, 2, 3, 5, 9, 17, 40]))] for _ in range(count)]


def _adapters(folder: Path, base: Path, architecture: str) -> list[Path]:
    """Ranks, scalings, patterns, targets and layers that differ from one another."""
    every = tiny.ARCHITECTURES[architecture][2]
    shapes = [
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
    fan = {"fan_in_fan_out": True} if architecture == "gpt2" else {}
    return [
        tiny.make_adapter(folder / f"adapter{i}", base, seed=i + 1, **shape, **fan)
        for i, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_mixed_batch_equals_peft_token_for_token(architecture: str, tmp_path: Path) -> None:
    base = tiny.make_base(tmp_path / "base", architecture)
    folders = [None, *_adapters(tmp_path, base, architecture)]
    prompts = _prompts(3)
    expected = {
        (index, row): tokens
        for index, folder in enumerate(folders)
        for row, tokens in enumerate(tiny.peft_generate(base, folder, prompts, 14))
    }
    for row in range(len(prompts)):
        answers = {tuple(expected[index, row]) for index in range(len(folders))}
        assert len(answers) > len(folders) // 2, "the adapters do not differ enough to tell"

    harness = Harness(base, max_num_seqs=6, max_loras=3, max_num_batched_tokens=48)
    keys = [None if folder is None else harness.adapter(folder) for folder in folders]
    order = list(itertools.product(range(len(folders)), range(len(prompts))))
    random.Random(1).shuffle(order)
    completions = harness.run(
        InferenceRequest(
            id=f"{index}/{row}",
            prompt=tuple(prompts[row]),
            adapter=keys[index],
            params=SamplingParams(max_new_tokens=14),
        )
        for index, row in order
    )
    assert max(stats.adapters for stats in harness.stats) == 3
    for (index, row), tokens in expected.items():
        assert list(completions[f"{index}/{row}"].token_ids) == tokens, (folders[index], row)


@pytest.mark.parametrize(
    "shape",
    [CacheShape(6, 160), CacheShape(60, 16), CacheShape(25, 8), CacheShape(40, 4)],
    ids=["slots", "paged", "preempting", "small-blocks"],
)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mistral"])
def test_text_is_the_same_whatever_the_cache_and_the_chunks(
    architecture: str, shape: CacheShape, tmp_path: Path
) -> None:
    base = tiny.make_base(tmp_path / "base", architecture)
    folder = tiny.make_adapter(tmp_path / "a", base, r=4, target_modules=tiny.ATTENTION)
    prompts = _prompts(9, seed=3)
    expected = tiny.peft_generate(base, folder, prompts, 20)
    harness = Harness(base, max_num_seqs=6, max_num_batched_tokens=11, cache_shape=shape)
    harness.engine._scheduler.lengths.ratio = 0.0  # nobody is expected to grow
    key = harness.adapter(folder)
    params = SamplingParams(max_new_tokens=20, ignore_eos=False)
    completions = harness.run(
        InferenceRequest(id=str(row), prompt=tuple(prompt), adapter=key, params=params)
        for row, prompt in enumerate(prompts)
    )
    assert [list(completions[str(row)].token_ids) for row in range(len(prompts))] == expected
    if shape.num_blocks * shape.block_size < 200:
        assert harness.stats[-1].preempted > 0
