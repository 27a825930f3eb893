"""Texts that rows share are computed once, and nothing but the work changes."""

import pytest
import torch

from tests.engine.harness import Harness
from worker.engine.cache_size import CacheShape
from worker.jobs import FinishReason, InferenceRequest, SamplingParams

HEAD = tuple(range(30, 90))
TAILS = [(1,), (2, 3), (4, 5, 6), (7,) * 9, tuple(range(100, 120)), (2, 3, 4)]
POISON = 271
MODES = {"argvalues": [None, CacheShape(120, 8)], "ids": ["own", "shared"]}


def request(name, prompt, adapter=None, **params):
    params = {"max_new_tokens": 8, "ignore_eos": True, **params}
    return InferenceRequest(id=name, prompt=tuple(prompt), adapter=adapter, params=SamplingParams(**params))


def job(adapters=(None,), head=HEAD, name=""):
    """Rows with one instruction, some greedy and some sampled."""
    return [
        request(f"{name}{number}/{row}", head + tail, key, do_sample=row % 2 == 1, temperature=1.5)
        for row, tail in enumerate(TAILS)
        for number, key in enumerate(adapters)
    ]


def tokens(completions):
    return {name: done.token_ids for name, done in completions.items() if done.failure is None}


def work(harness):
    """Prompt tokens computed and reused since last asked."""
    stats, harness.stats = harness.stats, []
    return sum(own.prompt_tokens for own in stats), sum(own.reused_tokens for own in stats)


@pytest.fixture(scope="module")
def plain(llama):
    return Harness(llama, max_num_seqs=6, prefix_reuse=False)


@pytest.fixture(scope="module")
def said(plain):
    """What rows say without reuse; each is asked once."""
    known = {}

    def said(rows):
        new = [row for row in rows if row not in known]
        done = tokens(plain.run(new))
        known.update((row, done[row.id]) for row in new)
        return {row.id: known[row] for row in rows}

    return said


@pytest.fixture(params=MODES["argvalues"], ids=MODES["ids"])
def harness(request, llama, make_harness):
    return make_harness(llama, max_num_seqs=6, cache_shape=request.param)


@pytest.fixture
def hook(harness):
    """Put a function of token ids and embeddings behind the embedding."""

    def put(function):
        embedding = harness.base.model.get_input_embeddings()
        return embedding.register_forward_hook(lambda _m, args, out: function(args[0][0], out[0]))

    return put


def nan_on_poison(ids, embedded):
    embedded[ids == POISON] = torch.nan


def raise_on_poison(ids, _embedded):
    if (ids == POISON).any():
        raise RuntimeError("poisoned")


def test_text_is_the_same_and_the_instruction_is_computed_once_for_each_adapter(
    plain, said, harness, adapters
):
    keys = [None, *map(harness.adapter, adapters[:2])]
    assert keys[1:] == list(map(plain.adapter, adapters[:2]))
    rows = job(keys)
    expected = said(rows)
    assert len(expected) == len(rows)
    assert tokens(harness.run(rows)) == expected
    computed, reused = work(harness)
    assert computed + reused == sum(len(row.prompt) for row in rows)
    followers = len(keys) * (len(TAILS) - 1)
    assert reused >= followers * 48, "whole granules of 60 tokens"
    assert tokens(harness.run(rows)) == expected, "from what free blocks remember"
    assert harness.stats[-1].preempted == 0


def test_nothing_is_reused_when_told_so(plain):
    work(plain)
    plain.run(job())
    plain.run(job())
    assert work(plain) == (2 * sum(len(row.prompt) for row in job()), 0)


def test_rows_of_other_adapters_never_share_even_one_token(plain, said, harness, adapters):
    """Two adapters and the base, with one and the same prompt, together and one after the other."""
    keys = [None, *map(harness.adapter, adapters[:2])]
    assert keys[1:] == list(map(plain.adapter, adapters[:2]))
    rows = [request(f"row{number}", HEAD, key) for number, key in enumerate(keys)]
    expected = said(rows)
    assert len(set(expected.values())) == 3
    assert tokens(harness.run(rows)) == expected
    assert work(harness) == (3 * len(HEAD), 0)


def test_new_version_of_an_adapter_reuses_nothing_of_the_old(plain, said, harness, adapters, tmp_path):
    answers = []
    for version, folder in (("1", adapters[1]), ("2", adapters[2])):
        (tmp_path / version).mkdir()
        (tmp_path / version / "tone").symlink_to(folder)
        key = harness.adapter(tmp_path / version / "tone", version)
        plain.adapter(tmp_path / version / "tone", version)
        row = request("row", HEAD, key)
        answers.append(tokens(harness.run([row])))
        assert answers[-1] == said([row])
        assert work(harness) == (len(HEAD), 0)
    assert answers[0] != answers[1]


@pytest.mark.parametrize("shape", [CacheShape(28, 8), CacheShape(14, 16), CacheShape(60, 4)])
def test_text_is_the_same_when_rows_are_preempted(shape, said, llama, make_harness):
    cramped = make_harness(llama, max_num_seqs=6, max_num_batched_tokens=24, cache_shape=shape)
    cramped.engine._scheduler.lengths.ratio = 0.0
    rows = [request(f"row{n}", HEAD[: 20 + n] + tail, max_new_tokens=40) for n, tail in enumerate(TAILS)]
    assert tokens(cramped.run(rows)) == said(rows)
    assert cramped.stats[-1].preempted > 0
    assert work(cramped)[1] > 0


@pytest.mark.parametrize("leave", ["abort", "preempt", "raise", "nan"])
def test_followers_say_what_they_would_alone_when_their_leader_leaves(leave, said, harness, hook):
    """In the middle of a prompt, or with nothing to show at its end."""
    rows = job()
    expected = said(rows)
    small = harness.engine._scheduler
    small.max_num_batched_tokens = 50
    handle = hook({"raise": raise_on_poison, "nan": nan_on_poison}.get(leave, lambda *_: None))
    harness.engine.add(request("leader", [*HEAD, POISON, *HEAD]))
    harness.engine.step()
    for row in rows:
        harness.engine.add(row)
    if leave == "abort":
        harness.engine.abort("leader")
    elif leave == "preempt":
        small.preempt(small.running[0])
    done = harness.drain()
    handle.remove()
    leader = done.pop("leader", None)
    assert (leader is None) == (leave == "abort")
    assert leave not in {"raise", "nan"} or leader.finish_reason is FinishReason.ERROR
    assert tokens(done) == expected
    assert tokens(harness.run(rows)) == expected


def test_what_was_never_proven_is_never_reused(harness, hook, said):
    """The row's last tokens are poisoned, so nobody knows whether its first ones were right."""
    handle = hook(nan_on_poison)
    harness.run([request("bad", [*HEAD, POISON])])
    handle.remove()
    work(harness)
    row = request("row", [*HEAD, 5])
    assert tokens(harness.run([row])) == said([row])
    assert work(harness) == (len(HEAD) + 1, 0)


@pytest.mark.parametrize("shape", MODES["argvalues"], ids=MODES["ids"])
@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3", "qwen2-window"])
def test_row_whose_early_tokens_were_not_finite_is_not_proven_by_its_late_ones(
    architecture, shape, kind, make_harness
):
    """No window of five tokens reaches so far, but here attention reads it, masked: so the row fails."""
    model = kind(architecture)
    row = request("row", [POISON, *HEAD, *HEAD])
    harness = make_harness(model.base, cache_shape=shape)
    embedding = harness.base.model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _m, args, out: nan_on_poison(args[0][0], out[0]))
    (bad,) = harness.run([row]).values()
    assert bad.finish_reason is FinishReason.ERROR
    handle.remove()
    work(harness)
    answer = tokens(harness.run([row]))["row"]
    assert list(answer) == model.greedy(None, row.prompt, answer)
    assert work(harness) == (len(row.prompt), 0)


def test_text_is_copied_before_its_block_goes_to_somebody_else(llama, said, make_harness):
    """In one step: the second row copies the first one's text, and the third gets the place it was in."""
    harness = make_harness(llama, max_num_seqs=2, max_num_batched_tokens=256)
    harness.run([request("first", [*HEAD, 1, 2, 3])])
    rows = [request("second", [*HEAD[:40], 5], max_new_tokens=40), request("third", HEAD[::-1])]
    assert tokens(harness.run(rows)) == said(rows)
    assert work(harness)[1] == 32


@pytest.mark.parametrize("trouble", [raise_on_poison, nan_on_poison])
def test_row_that_fails_after_its_copy_was_made_leaves_the_text_as_it_was(trouble, said, harness, hook):
    rows = job()
    expected = said(rows)
    first, *others = rows
    harness.run([first])
    handle = hook(trouble)
    for number in range(8):
        (done,) = harness.run([request(f"bad{number}", [*HEAD, number, POISON, 5])]).values()
        assert done.failure is not None
        assert done.token_ids == ()
    handle.remove()
    work(harness)
    got = tokens(harness.run(others))
    assert got == {name: own for name, own in expected.items() if name != first.id}
    assert work(harness)[1] >= len(others) * 48


def test_rows_join_a_running_row_with_the_same_text(said, harness):
    long = request("long", HEAD, max_new_tokens=40)
    expected = said([long, *job()])
    harness.engine.add(long)
    for _ in range(20):
        harness.engine.step()
    assert tokens(harness.run(job())) == expected


def test_prompts_that_are_equal_are_computed_once_but_for_their_end(said, harness):
    rows = [request(f"row{number}", HEAD, max_new_tokens=3) for number in range(12)]
    assert tokens(harness.run(rows)) == said(rows)
    computed, reused = work(harness)
    assert reused >= 11 * 48
    assert computed + reused == 12 * len(HEAD)


def test_answer_goes_on_from_the_row_it_belongs_to(said, harness):
    """A second turn begins with the first one's prompt and answer."""
    first = request("first", HEAD, max_new_tokens=30)
    (answer,) = tokens(harness.run([first])).values()
    work(harness)
    second = request("second", [*HEAD, *answer, 9])
    assert tokens(harness.run([second])) == said([second])
    assert work(harness)[1] >= 80
