"""A model that several ranks share says what it says on one device, and what PEFT says."""

import itertools
import random

import pytest

from tests import tiny
from tests.engine.ranks import ParallelHarness
from worker.jobs import InferenceRequest, SamplingParams

NEW = 12


def _prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.choice([1, 2, 3, 5, 9, 17, 40]))] for _ in range(count)]


def _requests(keys, prompts, new=NEW):
    order = list(itertools.product(range(len(keys)), range(len(prompts))))
    random.Random(1).shuffle(order)
    return [
        InferenceRequest(
            id=f"{index}/{row}",
            prompt=tuple(prompts[row]),
            adapter=keys[index],
            params=SamplingParams(max_new_tokens=new, ignore_eos=True),
        )
        for index, row in order
    ]


SHARED = [name for name in tiny.ARCHITECTURES if name not in {"gpt2", "opt"}]


@pytest.mark.parametrize("fully_sharded", [True, False], ids=["fully", "half"])
@pytest.mark.parametrize("architecture", SHARED)
def test_mixed_batch_equals_peft_token_for_token(architecture, fully_sharded, kind):
    model, prompts = kind(architecture), _prompts(3)
    with ParallelHarness(
        model.base, fully_sharded=fully_sharded, max_num_seqs=6, max_loras=3, max_num_batched_tokens=24
    ) as harness:
        keys = [None, *map(harness.adapter, model.adapters)]
        done = harness.run(_requests(keys, prompts))
    assert max(stats.adapters for stats in harness.stats) == 3
    for row, prompt in enumerate(prompts):
        answers = [list(done[f"{index}/{row}"].token_ids) for index in range(len(keys))]
        for index, answer in enumerate(answers):
            assert answer == model.greedy(index - 1 if index else None, prompt, answer), (index, row)
        assert len({tuple(answer) for answer in answers}) > len(keys) // 2, "the adapters differ too little"
