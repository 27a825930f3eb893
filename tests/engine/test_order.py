"""Whether the order in which rows start pays: steps that a job takes, and adapters in them."""

import random
from typing import NamedTuple

import pytest

from worker.engine.kv_cache import OwnBlocks, SharedBlocks
from worker.engine.lora_slots import LoRASlots
from worker.engine.scheduler import Scheduler
from worker.engine.sequence import Sequence
from worker.jobs import AdapterKey, FinishReason, InferenceRequest, SamplingParams

M = 16
LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256)


class Run(NamedTuple):
    steps: int
    adapter_steps: int
    """Adapters in each step, summed."""
    loads: int
    preempted: int
    mean_rows: float

    @property
    def adapters_a_row(self):
        return self.adapter_steps / self.steps / self.mean_rows


def job(seed, *, rows=64, adapters=32, lengths=LENGTHS):
    draw = random.Random(seed)
    made = []
    for number in range(rows):
        prompt = tuple(draw.randrange(1000) for _ in range(draw.randint(20, 60)))
        params = SamplingParams(max_new_tokens=draw.choice(lengths))
        key = AdapterKey(f"adapter{number % adapters}", "1")
        made.append(InferenceRequest(id=str(number), prompt=prompt, adapter=key, params=params))
    draw.shuffle(made)
    return made


def simulate(requests, *, bound=256, max_loras=32, cache=None, share=1.0):
    """Run to the end; each row generates `share` of what it may."""
    scheduler = Scheduler(
        cache or OwnBlocks(M, 4096),
        LoRASlots(max_loras),
        max_num_seqs=M,
        max_num_batched_tokens=2048,
        max_passed_over=bound,
    )
    for request in requests:
        scheduler.add(Sequence(request))

    def finish(row):
        ended = row.num_generated >= row.request.params.max_new_tokens * share
        return FinishReason.EOS_TOKEN if ended else None

    steps = adapter_steps = loads = rows = 0
    while scheduler.has_work:
        batch = scheduler.schedule()
        steps += 1
        rows += len(batch.rows)
        loads += len(batch.loads)
        adapter_steps += len({row.sequence.request.adapter for row in batch.rows})
        scheduler.advance(batch)
        scheduler.settle(batch, [(7, None) for row in batch.rows if row.samples], finish)
    return Run(steps, adapter_steps, loads, scheduler.num_preempted, rows / steps)


def mean(runs):
    return Run(*(sum(values) / len(values) for values in zip(*runs, strict=True)))


def first_come_first_served(requests, **options):
    return simulate(requests, bound=0, **options)


@pytest.fixture(scope="module")
def both():
    jobs = [job(seed) for seed in range(5)]
    return mean([simulate(own) for own in jobs]), mean([first_come_first_served(own) for own in jobs])


def test_job_of_mixed_lengths_ends_earlier_than_first_come_first_served(both):
    ours, theirs = both
    assert ours.steps < 0.85 * theirs.steps
    least = sum(sum(own.params.max_new_tokens for own in job(seed)) / M for seed in range(5)) / 5
    assert ours.steps < 1.05 * least, "a batch that is full to the end takes so many"


def test_job_of_mixed_lengths_has_fewer_adapters_in_its_steps(both):
    ours, theirs = both
    assert ours.adapter_steps < 0.85 * theirs.adapter_steps
    assert ours.adapters_a_row < 0.85 * theirs.adapters_a_row


def test_job_with_more_rows_than_adapters_has_far_fewer_in_a_step():
    jobs = [job(seed, rows=128, adapters=8) for seed in range(3)]
    ours = mean([simulate(own) for own in jobs])
    theirs = mean([first_come_first_served(own) for own in jobs])
    assert ours.steps < 0.9 * theirs.steps
    assert ours.adapter_steps / ours.steps < 0.5 * theirs.adapter_steps / theirs.steps


def test_rows_of_one_length_run_adapter_by_adapter():
    requests = job(0, lengths=(100,))
    ours, theirs = simulate(requests), first_come_first_served(requests)
    assert ours.steps == theirs.steps == 400
    assert ours.adapter_steps / ours.steps == 8, "two rows of each adapter"
    assert theirs.adapter_steps / theirs.steps > 13


def test_few_slots_cost_little_and_are_loaded_once_an_adapter():
    """16 adapters in 8 slots."""
    jobs = [job(seed, rows=128, adapters=16) for seed in range(3)]
    resident = mean([simulate(own, max_loras=16) for own in jobs])
    few = mean([simulate(own, max_loras=8) for own in jobs])
    assert few.steps < 1.05 * resident.steps
    assert few.loads < 1.2 * 16
    assert mean([first_come_first_served(own, max_loras=8) for own in jobs]).steps > 1.4 * few.steps


def test_tight_bound_keeps_the_batch_filled():
    """Rows far behind the oldest may not start, so what may start has to be used well."""
    jobs = [job(seed, rows=256, adapters=16) for seed in range(2)]
    tight = mean([simulate(own, max_loras=8, bound=64) for own in jobs])
    strict = mean([first_come_first_served(own, max_loras=8) for own in jobs])
    assert tight.steps < 0.8 * strict.steps


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_forecast_fills_a_small_cache_with_hardly_a_preemption(share):
    requests = job(0, rows=128, adapters=4)
    roomy = simulate(requests, share=share)
    tight = simulate(requests, share=share, cache=SharedBlocks(150, 16))
    assert tight.preempted <= 8
    assert tight.mean_rows > 0.6 * roomy.mean_rows
