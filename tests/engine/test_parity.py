"""Greedy fp32 output of a mixed batch is PEFT's own, token for token."""

import itertools
import random

import pytest

from tests import tiny
from tests.engine.harness import Harness
from worker.engine.cache_size import CacheShape
from worker.jobs import InferenceRequest, SamplingParams

NEW = 14
EOS = 256


def _prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.choice([1, 2, 3, 5, 9, 17, 40]))] for _ in range(count)]


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_mixed_batch_equals_peft_token_for_token(architecture, kind, make_harness):
    model, prompts = kind(architecture), _prompts(3)
    harness = make_harness(model.base, max_num_seqs=6, max_loras=3, max_num_batched_tokens=24)
    keys = [None, *map(harness.adapter, model.adapters)]
    order = list(itertools.product(range(len(keys)), range(len(prompts))))
    random.Random(1).shuffle(order)
    completions = harness.run(
        InferenceRequest(
            id=f"{index}/{row}",
            prompt=tuple(prompts[row]),
            adapter=keys[index],
            params=SamplingParams(max_new_tokens=NEW),
        )
        for index, row in order
    )
    assert max(stats.adapters for stats in harness.stats) == 3
    for row, prompt in enumerate(prompts):
        answers = [list(completions[f"{index}/{row}"].token_ids) for index in range(len(keys))]
        for index, answer in enumerate(answers):
            assert answer == model.greedy(index - 1 if index else None, prompt, answer), (index, row)
            assert len(answer) == NEW or answer[-1] == EOS
            assert EOS not in answer[:-1]
        distinct = {tuple(answer) for answer in answers}
        assert len(distinct) > len(keys) // 2, "the adapters do not differ enough to tell"


@pytest.fixture(scope="module", params=["llama", "gemma2", "mistral"])
def generated(request, kind):
    """A model, an adapter of it, prompts, and what PEFT's own `generate` makes of them."""
    model, prompts = kind(request.param), _prompts(9, seed=3)
    folder = model.adapters[1]
    return model.base, folder, prompts, tiny.peft_generate(model.base, folder, prompts, 20)


@pytest.mark.parametrize(
    "shape",
    [CacheShape(6, 160), CacheShape(60, 16), CacheShape(25, 8), CacheShape(40, 4)],
    ids=["slots", "paged", "preempting", "small-blocks"],
)
def test_text_is_the_same_whatever_the_cache_and_the_chunks(shape, generated):
    base, folder, prompts, expected = generated
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
