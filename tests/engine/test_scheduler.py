"""Which rows the scheduler lets run, and when."""

import pytest

from tests.engine.scheduling import KEYS, at_length, sequence
from worker.engine.kv_cache import OwnBlocks, SharedBlocks
from worker.engine.lora_slots import LoRASlots
from worker.engine.scheduler import Batch, Scheduler
from worker.engine.sequence import Status
from worker.jobs import AdapterKey, FinishReason


def compute(scheduler, batch, finish=at_length):
    """Record `batch` as if the model had run; returns the sequences that ended."""
    scheduler.advance(batch)
    return scheduler.settle(batch, [(7, None) for row in batch.rows if row.samples], finish)


def scheduler_of(*, blocks=100, max_num_seqs=8, tokens=64, max_loras=2, own=False, rows=(), **options):
    cache = OwnBlocks(max_num_seqs, 400) if own else SharedBlocks(blocks, 4)
    limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": tokens, **options}
    scheduler = Scheduler(cache, LoRASlots(max_loras), **limits)
    for row in rows:
        scheduler.add(row)
    return scheduler


def names(batch):
    return [row.sequence.request.id for row in batch.rows]


def starts(scheduler):
    """Names in the order in which rows start, all work done."""
    seen = []
    while scheduler.has_work:
        batch = scheduler.schedule()
        seen += [name for name in names(batch) if name not in seen]
        compute(scheduler, batch)
    return seen


def test_nothing_to_do_is_an_empty_batch():
    scheduler = scheduler_of()
    assert not scheduler.has_work
    assert scheduler.schedule() == Batch(())


def test_long_prompt_goes_through_in_chunks_while_others_decode():
    short, long = sequence("short", 2, max_new_tokens=9), sequence("long", 20)
    scheduler = scheduler_of(max_num_seqs=2, tokens=8, rows=[short, long])
    seen = []
    for _ in range(4):
        batch = scheduler.schedule()
        seen.append([row.num_tokens for row in batch.rows])
        compute(scheduler, batch)
        assert long.num_generated == max(0, len(seen) - 2), "a row samples when its last chunk is through"
    assert seen == [[2, 6], [1, 7], [1, 7], [1, 1]]


def test_chunk_leaves_a_token_for_every_row_behind_it():
    scheduler = scheduler_of(max_num_seqs=4, tokens=4, rows=[sequence("long", 30, max_new_tokens=9)])
    compute(scheduler, scheduler.schedule())
    for name in "abc":
        scheduler.add(sequence(name, 1))
    for _ in range(5):
        batch = scheduler.schedule()
        assert batch.num_tokens <= 4
        compute(scheduler, batch)


def test_rows_that_are_alike_start_in_the_order_in_which_they_came():
    rows = [sequence(str(number), 5) for number in range(5)]
    scheduler = scheduler_of(max_num_seqs=3, rows=rows)
    assert names(scheduler.schedule()) == ["0", "1", "2"]


def test_row_without_room_is_not_passed_over_by_a_smaller_one():
    scheduler = scheduler_of(blocks=9, rows=[sequence("first", 8)])
    compute(scheduler, scheduler.schedule())
    scheduler.add(sequence("small", 1))
    scheduler.add(sequence("big", 30))
    assert names(scheduler.schedule()) == ["first"]


def test_first_row_of_an_empty_batch_starts_whatever_is_expected_of_it():
    scheduler = scheduler_of(blocks=2, rows=[sequence("row", 3, max_new_tokens=1000)])
    assert names(scheduler.schedule()) == ["row"]


def test_row_that_waits_for_a_slot_lets_others_pass():
    rows = [sequence("a", adapter=KEYS[0]), sequence("b", adapter=KEYS[1]), sequence("base")]
    scheduler = scheduler_of(max_loras=1, rows=[*rows, sequence("a2", adapter=KEYS[0])])
    batch = scheduler.schedule()
    assert set(names(batch)) == {"a", "base", "a2"}
    assert batch.loads == ((0, KEYS[0]),)
    assert [row.request.id for row in scheduler.waiting] == ["b"]


@pytest.mark.parametrize("bound", [0, 1, 2, 5])
def test_row_is_passed_over_by_no_more_rows_than_stated_even_in_one_step(bound):
    rows = [sequence("a", adapter=KEYS[0]), sequence("b", adapter=KEYS[1])]
    rows += [sequence(f"base{number}") for number in range(6)]
    scheduler = scheduler_of(max_loras=1, max_passed_over=bound, rows=rows)
    assert names(scheduler.schedule()) == ["a", *(f"base{number}" for number in range(bound))]


def test_passed_over_row_is_next_once_the_bound_is_reached():
    first = sequence("first", adapter=KEYS[0], max_new_tokens=3)
    scheduler = scheduler_of(max_num_seqs=2, max_loras=1, max_passed_over=2, rows=[first])
    scheduler.add(sequence("waits", adapter=KEYS[1]))
    for number in range(6):
        scheduler.add(sequence(f"base{number}", max_new_tokens=1))
    assert starts(scheduler)[:4] == ["first", "base0", "base1", "waits"]


def test_bound_of_nothing_is_first_come_first_served():
    rows = [
        sequence(str(number), 1 + number % 3, [None, *KEYS][number % 4], max_new_tokens=1 + number % 5)
        for number in range(30)
    ]
    assert starts(scheduler_of(max_passed_over=0, max_num_seqs=4, rows=rows)) == [str(n) for n in range(30)]


def test_preempted_row_goes_before_new_ones_and_keeps_its_text():
    old, young = sequence("old", 6, max_new_tokens=10), sequence("young", 6, KEYS[0], max_new_tokens=10)
    scheduler = scheduler_of(blocks=4, rows=[old, young])
    scheduler.lengths.ratio = 0.0  # nobody is expected to grow
    for _ in range(3):
        compute(scheduler, scheduler.schedule())
    scheduler.add(sequence("last"))
    batch = scheduler.schedule()
    assert names(batch) == ["old"]
    assert scheduler.num_preempted == 1
    assert [row.request.id for row in scheduler.waiting] == ["young", "last"]
    assert young.num_generated == 3
    assert (young.computed, young.blocks, young.slot) == (0, [], None)
    scheduler.check_integrity()
    assert starts(scheduler) == ["old", "young", "last"]


def test_preempted_row_without_a_slot_is_passed_by_no_more_rows_than_stated():
    scheduler = scheduler_of(
        max_num_seqs=2, max_loras=1, max_passed_over=2, rows=[sequence("p", adapter=KEYS[0])]
    )
    compute(scheduler, scheduler.schedule())
    (preempted,) = scheduler.running
    scheduler.preempt(preempted)
    scheduler.slots.acquire(KEYS[1])  # by somebody who stays
    for number in range(6):
        scheduler.add(sequence(str(number), max_new_tokens=1))
    seen = []
    for _ in range(6):
        batch = scheduler.schedule()
        seen += names(batch)
        compute(scheduler, batch)
    assert seen == ["0", "1"]
    assert scheduler.waiting.due is preempted
    scheduler.slots.release(KEYS[1])
    assert starts(scheduler) == ["p", "2", "3", "4", "5"]


def test_row_that_loses_least_is_preempted():
    long, short = sequence("long", 12, max_new_tokens=20), sequence("short", 5, max_new_tokens=20)
    first = sequence("first", 4, max_new_tokens=20)
    scheduler = scheduler_of(blocks=10, rows=[first])
    scheduler.lengths.ratio = 0.0
    compute(scheduler, scheduler.schedule())
    for row in (short, long):
        scheduler.add(row)
        compute(scheduler, scheduler.schedule())
    assert names(scheduler.schedule()) == ["first", "short", "long"]
    compute(scheduler, scheduler.schedule())
    while not scheduler.num_preempted:
        compute(scheduler, scheduler.schedule())
    assert short.status is Status.WAITING
    assert {first.status, long.status} == {Status.RUNNING}


def test_versions_of_one_name_have_slots_of_their_own():
    old, new = AdapterKey("tone", "1"), AdapterKey("tone", "2")
    rows = [sequence("old", adapter=old), sequence("new", adapter=new)]
    assert scheduler_of(rows=rows).schedule().loads == ((0, old), (1, new))


# Texts in common

HEAD = [5] * 100


def job(count, adapters=(None,)):
    """Rows that begin alike and end differently."""
    return [
        sequence(str(number), [*HEAD, number], adapters[number % len(adapters)]) for number in range(count)
    ]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("tokens", [512, 40])
def test_rows_of_a_job_compute_what_they_share_once_for_each_adapter(own, tokens):
    adapters = [None, *KEYS[:2]]
    scheduler = scheduler_of(own=own, tokens=tokens, blocks=400, max_num_seqs=6, rows=job(24, adapters))
    computed = reused = 0
    while scheduler.has_work:
        batch = scheduler.schedule()
        computed += sum(row.num_prompt_tokens for row in batch.rows)
        reused += batch.reused_tokens
        compute(scheduler, batch)
        scheduler.check_integrity()
    known = 96 if own else 100
    assert reused == 21 * known
    assert computed == 24 * 101 - reused


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("leave", ["abort", "preempt"])
def test_followers_go_on_when_their_leader_leaves(own, leave):
    scheduler = scheduler_of(own=own, tokens=64, rows=job(3))
    compute(scheduler, scheduler.schedule())
    scheduler.schedule()
    (leader,) = scheduler.running
    assert len(scheduler.waiting.aside) == 2
    if leave == "abort":
        scheduler.finish(leader, FinishReason.ERROR)
    else:
        scheduler.preempt(leader)
    assert not scheduler.waiting.aside
    scheduler.check_integrity()
    assert set(starts(scheduler)) >= {"1", "2"}


def test_followers_keep_their_places():
    """A new adapter does not get in between: it would stay longer than they have to wait."""
    rows = [*job(4, [KEYS[0]]), sequence("other", 3, KEYS[1], max_new_tokens=1)]
    scheduler = scheduler_of(tokens=512, max_num_seqs=4, rows=rows)
    assert names(scheduler.schedule()) == ["0"]


def test_follower_that_is_aborted_is_not_brought_back():
    follower = job(2)[1]
    scheduler = scheduler_of(tokens=512, rows=[job(1)[0], follower])
    batch = scheduler.schedule()
    assert scheduler.waiting.aside == {follower}
    scheduler.finish(follower, FinishReason.ERROR)
    scheduler.check_integrity()
    compute(scheduler, batch)
    assert starts(scheduler) == ["0"]


@pytest.mark.parametrize("own", [True, False])
def test_row_that_needs_the_logits_of_its_prompt_reuses_nothing(own):
    first, second = (sequence(name, HEAD, max_new_tokens=1) for name in "ab")
    whole = sequence("c", HEAD, max_new_tokens=1, prompt_log_probs=True)
    scheduler = scheduler_of(own=own, tokens=512, rows=[first])
    compute(scheduler, scheduler.schedule())
    scheduler.add(whole)
    scheduler.add(second)
    batch = scheduler.schedule()
    assert {row.sequence.request.id: row.num_tokens > 50 for row in batch.rows} == {"b": False, "c": True}


@pytest.mark.parametrize("own", [True, False])
def test_preempted_row_finds_its_own_blocks_again(own):
    row = sequence("row", 50, max_new_tokens=30)
    scheduler = scheduler_of(own=own, blocks=40, rows=[row])
    for _ in range(15):
        compute(scheduler, scheduler.schedule())
    held = list(row.blocks)
    scheduler.preempt(row)
    ((again, _, num_tokens, _),) = scheduler.schedule().rows
    assert again is row
    assert num_tokens == 1  # 64 of 65 tokens
    assert row.blocks[:16] == held[:16]


def test_preempted_in_the_middle_of_its_prompt_finds_nothing():
    """Nobody has looked at its logits yet."""
    row = sequence("row", 50)
    scheduler = scheduler_of(tokens=20, rows=[row])
    for _ in range(2):
        compute(scheduler, scheduler.schedule())
    blocks = list(row.blocks)
    scheduler.preempt(row)
    batch = scheduler.schedule()
    assert batch.rows[0].num_tokens == 20
    assert row.blocks == blocks[:5]
    assert batch.leftovers == tuple((block, 0, 4) for block in row.blocks)


@pytest.mark.parametrize("own", [True, False])
def test_row_that_failed_leaves_to_the_next_what_was_proven_and_nothing_else(own):
    head = list(range(20))
    rows = [sequence("bad", head, max_new_tokens=9)]
    scheduler = scheduler_of(own=own, blocks=6, max_num_seqs=1, rows=rows)
    first = scheduler.schedule()
    assert first.leftovers == ()
    compute(scheduler, first)
    (bad,) = (row.sequence for row in scheduler.schedule().rows)  # and that step's logits are not finite
    block = bad.blocks[-1]
    scheduler.finish(bad, FinishReason.ERROR)
    scheduler.add(sequence("next", head, max_new_tokens=1))
    batch = scheduler.schedule()
    assert batch.rows[0].start == 16
    assert batch.leftovers == ((block, 16, 21) if own else (block, 0, 1),)


# Log-probabilities of prompts


def test_step_scores_no_more_prompt_tokens_than_stated():
    scored = [sequence(name, 50, max_new_tokens=2, prompt_log_probs=True) for name in "ab"]
    rows = [scored[0], sequence("plain", 50, max_new_tokens=2), scored[1]]
    scheduler = scheduler_of(tokens=200, rows=rows)
    scheduler.max_scored_tokens = 16
    seen = []
    while scheduler.has_work:
        batch = scheduler.schedule()
        seen.append({row.sequence.request.id: (row.num_tokens, row.keep) for row in batch.rows})
        compute(scheduler, batch)
    assert seen[0] == {"a": (16, 16), "plain": (50, 1), "b": (1, 1)}
    assert seen[3] == {"a": (2, 2), "b": (15, 15)}, "a's last token gives its first new one"
    assert all(sum(keep for _, keep in own.values()) <= 16 + len(own) for own in seen)


def test_prompt_is_scored_once_and_fast_again_after_a_preemption():
    row = sequence("row", 50, max_new_tokens=2, prompt_log_probs=True)
    scheduler = scheduler_of(rows=[row])
    scheduler.max_scored_tokens = 16
    positions = []
    while scheduler.has_work:
        batch = scheduler.schedule()
        ((_, start, num_tokens, _),) = batch.rows
        scored = batch.rows[0].scored
        compute(scheduler, batch)
        positions += scored
        row.scores += scored
        if row.computed == 32 and not scheduler.num_preempted:
            scheduler.preempt(row)
        elif scheduler.num_preempted and start == 0:
            assert num_tokens == 32 + 16
    assert positions == list(range(49))


# Expectations


def test_rows_that_are_expected_to_grow_out_of_the_cache_do_not_start_together():
    rows = [sequence(name, 4, max_new_tokens=20) for name in "ab"]
    scheduler = scheduler_of(blocks=9, rows=rows)
    assert names(scheduler.schedule()) == ["a"]
    scheduler = scheduler_of(blocks=13, rows=[sequence(name, 4, max_new_tokens=20) for name in "ab"])
    assert names(scheduler.schedule()) == ["a", "b"]


def test_row_that_ends_before_another_grows_makes_room_in_the_forecast():
    rows = [sequence("long", 4, max_new_tokens=20), sequence("short", 12, max_new_tokens=2)]
    scheduler = scheduler_of(blocks=9, rows=rows)
    assert set(names(scheduler.schedule())) == {"long", "short"}


def test_share_of_max_new_tokens_that_rows_generate_is_learned():
    scheduler = scheduler_of(max_num_seqs=1)
    assert scheduler.lengths.ratio == 1.0
    for number in range(100):
        scheduler.add(sequence(str(number), 3, max_new_tokens=20))
    while scheduler.has_work:
        ends = lambda row: FinishReason.EOS_TOKEN if row.num_generated == 5 else None  # noqa: E731
        compute(scheduler, scheduler.schedule(), ends)
    assert scheduler.lengths.ratio == pytest.approx(0.25, abs=0.01)
    scheduler.lengths.learn_shortage()
    assert scheduler.lengths.ratio > 0.4


def test_nothing_is_preempted_while_rows_are_no_longer_than_they_may_be():
    rows = [sequence(str(number), 1 + number % 7, max_new_tokens=1 + number % 23) for number in range(60)]
    scheduler = scheduler_of(blocks=15, rows=rows)
    starts(scheduler)
    assert scheduler.num_preempted == 0


def score(scheduler, batch):
    """Compute a step, with the position for a score."""
    for row in batch.rows:
        row.sequence.scores += row.scored
    return compute(scheduler, batch)


def test_row_to_be_scored_ends_with_its_prompt_and_keeps_the_logits_of_its_targets_alone():
    row, other = sequence("row", 50, targets=5), sequence("other", 3, max_new_tokens=9)
    scheduler = scheduler_of(tokens=40, rows=[row, other])
    seen = []
    while row.status is not Status.FINISHED:
        batch = scheduler.schedule()
        seen += [(own.num_tokens, own.keep, own.samples) for own in batch.rows if own.sequence is row]
        score(scheduler, batch)
    assert sum(tokens for tokens, _, _ in seen) == 50
    assert [keep for _, keep, _ in seen] == [0] * (len(seen) - 1) + [5]
    assert not any(samples for _, _, samples in seen)
    assert row.finish_reason is FinishReason.LENGTH
    assert row.generated == []
    assert row.scores == [45, 46, 47, 48, 49]
    assert other.status is Status.RUNNING
    assert scheduler.lengths.ratio == 1.0, "it says nothing of how long answers are"


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("targets", [1, 9, len(HEAD)])
def test_row_to_be_scored_reuses_nothing_that_has_to_be_scored(own, targets):
    first, second = sequence("a", HEAD, max_new_tokens=1), sequence("b", HEAD, targets=targets)
    scheduler = scheduler_of(own=own, tokens=512, rows=[first])
    score(scheduler, scheduler.schedule())
    scheduler.add(second)
    ((_, start, num_tokens, _),) = scheduler.schedule().rows
    granule = scheduler.kv_cache.granule
    assert start == (len(HEAD) - targets) // granule * granule
    assert num_tokens == len(HEAD) - start


def test_rows_to_be_scored_wait_for_the_first_of_them_to_compute_what_they_share():
    rows = [sequence(name, [*HEAD, *tail], targets=2) for name, tail in (("a", [1]), ("b", [2]), ("c", [3]))]
    scheduler = scheduler_of(tokens=512, rows=rows)
    batch = scheduler.schedule()
    assert [row.sequence.request.id for row in batch.rows] == ["a"]
    score(scheduler, batch)
    batch = scheduler.schedule()
    assert {row.sequence.request.id for row in batch.rows} == {"b", "c"}
    assert all(row.num_tokens < 10 for row in batch.rows)


def test_scores_survive_a_preemption_and_what_they_needed_may_then_be_reused():
    row = sequence("row", HEAD, targets=len(HEAD))
    scheduler = scheduler_of(rows=[row])
    scheduler.max_scored_tokens = 16
    while scheduler.has_work:
        score(scheduler, scheduler.schedule())
        if row.computed == 32 and not scheduler.num_preempted:
            scheduler.preempt(row)
            assert row.num_reusable == 32
    assert scheduler.num_preempted == 1
    assert row.scores == list(range(len(HEAD)))
