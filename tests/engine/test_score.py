"""Tokens that rows were given are as likely as transformers and PEFT say, in whatever company and cache."""

import functools
import itertools
import math
import random

import pytest
import torch
from peft import PeftModel

from tests import tiny
from tests.engine.harness import Harness
from worker.engine.cache_size import CacheShape
from worker.errors import InvalidParameters, PromptTooLong
from worker.jobs import FinishReason, InferenceRequest, SamplingParams

NOTHING = SamplingParams(max_new_tokens=0)
SHAPES = {"own": None, "shared": CacheShape(60, 16), "preempting": CacheShape(25, 8)}
HEAD = tuple(range(30, 90))


def to_score(name, tokens, num_targets, adapter=None):
    """A row of these tokens whose last ones are scored."""
    return InferenceRequest(
        id=name,
        prompt=tuple(tokens[:-1]),
        targets=tuple(tokens[len(tokens) - num_targets :]),
        adapter=adapter,
        params=NOTHING,
    )


def generating(name, prompt, adapter=None, new=9, **params):
    params = SamplingParams(max_new_tokens=new, ignore_eos=True, **params)
    return InferenceRequest(id=name, prompt=tuple(prompt), adapter=adapter, params=params)


@functools.lru_cache(maxsize=3)
def plain_model(base, adapter):
    """Transformers' own model, under PEFT if there is an adapter."""
    model = tiny.load_base(base)
    return model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()


@torch.inference_mode()
def expected(base, adapter, tokens, num_targets):
    """What `answer` says of the whole row by the plain model."""
    logits = plain_model(base, adapter)(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return answer(logits, tokens, num_targets)


def answer(logits, tokens, num_targets):
    """Log-softmax at the targets, and whether each is the argmax."""
    logits = logits[-num_targets - 1 : -1]
    targets = torch.tensor(tokens[-num_targets:])
    log_probs = logits.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    return log_probs.tolist(), bool((logits.argmax(-1) == targets).all())


def assert_scored(completion, log_probs, is_greedy):
    assert completion.failure is None
    assert completion.score.log_probs == pytest.approx(log_probs, abs=1e-4)
    assert completion.score.is_greedy is is_greedy
    assert (completion.token_ids, completion.text) == ((), "")
    assert completion.finish_reason is FinishReason.LENGTH
    assert completion.prompt_log_probs is None


def rows_of(length_of_prompts, seed=0):
    """Tokens and how many of them are scored: one, some, or all but the first."""
    rng = random.Random(seed)
    for length in length_of_prompts:
        tokens = [rng.randrange(256) for _ in range(length)]
        for count in sorted({1, (length + 1) // 2, length - 1}):
            yield tokens, count


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_scores_are_log_softmax_of_the_plain_model_with_and_without_adapters(
    architecture, kind, make_harness
):
    model = kind(architecture)
    harness = make_harness(model.base, max_num_seqs=6, max_loras=3, max_num_batched_tokens=24)
    numbers = [None, 1, 3]
    keys = [number and harness.adapter(model.adapters[number]) for number in numbers]
    rows = list(itertools.product(range(3), rows_of([2, 3, 17, 40])))
    wanted = {n: answer(model.logits(numbers[index], row[0]), *row) for n, (index, row) in enumerate(rows)}
    assert len({tuple(log_probs) for log_probs, _ in wanted.values()}) == len(rows), "all the same"
    company = [generating(f"g{n}", HEAD[: 5 + n], keys[n % 3], new=20) for n in range(3)]
    done = harness.run(
        [*company, *(to_score(str(n), *row, keys[index]) for n, (index, row) in enumerate(rows))]
    )
    for n, own in wanted.items():
        assert_scored(done[str(n)], *own)
    assert max(stats.adapters for stats in harness.stats) == 2


@pytest.fixture(scope="module")
def wanted(llama, adapters):
    """Rows for the base and two adapters, and what is to be said of them."""
    rows = list(itertools.product([None, 0, 1], rows_of([2, 9, 33, 75], seed=5)))
    folders = {None: None, 0: adapters[0], 1: adapters[1]}
    return [(index, row, expected(llama, folders[index], *row)) for index, row in rows]


def company(keys):
    return [generating(f"g{n}", HEAD[n : n + 20], keys[n % 2], new=40) for n in range(9)]


@pytest.fixture(scope="module")
def alone(llama):
    """What the company without an adapter says by itself."""
    return Harness(llama, max_num_seqs=6).run(company([None, None])[::2])


@pytest.mark.parametrize(
    ("shape", "look_ahead", "limit"),
    [
        ("own", False, 7),
        ("own", True, 256),
        ("shared", False, 256),
        ("shared", True, 7),
        ("preempting", False, 7),
        ("preempting", True, 256),
    ],
)
def test_scores_are_the_same_in_chunks_after_preemptions_and_beside_rows_that_generate(
    shape, look_ahead, limit, wanted, alone, llama, make_harness, adapters
):
    harness = make_harness(
        llama,
        max_num_seqs=6,
        max_num_batched_tokens=24,
        cache_shape=SHAPES[shape],
        look_ahead=look_ahead,
    )
    scheduler = harness.engine._scheduler
    scheduler.max_scored_tokens = limit
    scheduler.lengths.ratio = 0.0  # rows are let in that will not all fit
    scheduler.lengths.learn = scheduler.lengths.learn_shortage = lambda *_: None
    keys = {None: None, 0: harness.adapter(adapters[0]), 1: harness.adapter(adapters[1])}
    rows = [to_score(str(n), *row, keys[index]) for n, (index, row, _) in enumerate(wanted)]
    mixed = itertools.zip_longest(rows, company([keys[None], keys[1]]))
    done = harness.run(row for pair in mixed for row in pair if row is not None)
    for n, (_, _, own) in enumerate(wanted):
        assert_scored(done[str(n)], *own)
    assert (harness.stats[-1].preempted > 0) == (shape == "preempting")
    assert all(done[name].token_ids == own.token_ids for name, own in alone.items())


@pytest.mark.parametrize("shape", SHAPES)
def test_choices_with_one_context_compute_it_once_and_score_all_of_theirs(
    shape, llama, make_harness, adapters
):
    harness = make_harness(llama, max_num_seqs=6, cache_shape=SHAPES[shape])
    key = harness.adapter(adapters[1])
    rows = [(*HEAD, *range(n, n + 4)) for n in range(100, 108)]
    for _ in range(2):
        done = harness.run([to_score(str(n), row, 4, key) for n, row in enumerate(rows)])
        for n, row in enumerate(rows):
            assert_scored(done[str(n)], *expected(llama, adapters[1], row, 4))
        reused = sum(stats.reused_tokens for stats in harness.stats)
        assert reused >= 7 * 48, "whole granules of 60 tokens"
    again = harness.run([to_score("whole", rows[0], len(rows[0]) - 1, key)])
    assert sum(stats.reused_tokens for stats in harness.stats) == reused, "all of it had to be scored"
    assert_scored(again["whole"], *expected(llama, adapters[1], rows[0], len(rows[0]) - 1))


def test_scored_rows_leave_what_they_computed_to_those_that_generate(llama, make_harness):
    harness = make_harness(llama, max_num_seqs=6)
    plain = harness.run([generating("row", HEAD)])["row"]
    other = make_harness(llama, max_num_seqs=6)
    other.run([to_score("scored", (*HEAD, 5), 1)])
    assert other.run([generating("row", HEAD)])["row"].token_ids == plain.token_ids
    assert sum(stats.reused_tokens for stats in other.stats) == 48


def test_what_a_row_would_say_is_greedy_and_anything_else_is_not(llama, make_harness):
    harness = make_harness(llama)
    said = harness.run([generating("row", HEAD, new=6)])["row"].token_ids
    rows = [to_score("said", (*HEAD, *said), 6)]
    for place in range(6):
        other = [token if n != place else (token + 1) % 256 for n, token in enumerate(said)]
        rows.append(to_score(str(place), (*HEAD, *other), 6))
    done = harness.run(rows)
    assert done.pop("said").score.is_greedy
    assert not any(own.score.is_greedy for own in done.values())


def test_no_logits_are_kept_but_those_of_targets(llama, make_harness, monkeypatch):
    harness = make_harness(llama, max_num_batched_tokens=32)
    kept = []
    run = harness.runner._executor.run

    def noted(rows, *latest):
        logits = run(rows, *latest)
        kept.append(len(logits))
        return logits

    monkeypatch.setattr(harness.runner._executor, "run", noted)
    harness.run([to_score("a", HEAD, 3), to_score("b", HEAD[::-1], 40)])
    assert sum(kept) == 43
    assert sum(stats.generated_tokens for stats in harness.stats) == 0


def test_row_to_be_scored_may_have_a_token_more_than_the_model_sees(llama, make_harness):
    harness = make_harness(llama, max_model_len=40)
    tokens = [n % 256 for n in range(41)]
    assert_scored(harness.run([to_score("row", tokens, 40)])["row"], *expected(llama, None, tokens, 40))
    with pytest.raises(PromptTooLong, match=r"has 42 tokens; to be scored it may have one more than .* 40"):
        harness.engine.check(to_score("row", [*tokens, 1], 1))


def test_token_that_the_model_cannot_write_is_refused(llama, make_harness):
    harness = make_harness(llama)
    with pytest.raises(
        InvalidParameters, match="has token 272 to be scored, the base model writes 272 tokens"
    ):
        harness.engine.check(to_score("row", [1, 2, 272], 1))


@pytest.mark.parametrize("place", [0, 30, 59])
def test_row_whose_logits_are_not_finite_fails_alone_and_leaves_nothing_behind(place, llama, make_harness):
    harness = make_harness(llama, max_num_batched_tokens=24)
    embedding = harness.base.model.get_input_embeddings()

    def poison(_module, args, out):
        out[0][args[0][0] == 271] = torch.nan

    handle = embedding.register_forward_hook(poison)
    bad = [*HEAD[:place], 271, *HEAD[place + 1 :], 5]
    done = harness.run([to_score("bad", bad, 1), to_score("good", (*HEAD, 5), 1)])
    handle.remove()
    assert done["bad"].score is None
    assert done["bad"].failure.code == "internal"
    assert_scored(done["good"], *expected(llama, None, (*HEAD, 5), 1))
    again = harness.run([to_score("bad", bad, 1)])
    assert_scored(again["bad"], *expected(llama, None, bad, 1))


def test_aborted_row_ends_without_a_score(llama, make_harness):
    harness = make_harness(llama, max_num_batched_tokens=24)
    harness.engine.add(to_score("row", HEAD, 50))
    harness.engine.step()
    harness.engine.abort("row")
    harness.engine.check_integrity()
    assert not harness.engine.has_work


def test_sum_of_scores_does_not_depend_on_where_the_target_begins(llama, make_harness):
    """What is likely as a whole is as likely in two parts."""
    harness = make_harness(llama)
    done = harness.run([to_score("whole", HEAD, 59), to_score("a", HEAD[:31], 30), to_score("b", HEAD, 29)])
    whole, first, second = (math.fsum(done[name].score.log_probs) for name in ("whole", "a", "b"))
    assert whole == pytest.approx(first + second, abs=1e-3)
