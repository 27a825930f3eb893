"""Temperature, cuts and draws: transformers' distribution, whatever stands in the batch beside a row."""

import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.engine.sampling import CPU, CUTS, VOCAB, logits_of, row, warped
from worker.engine import draws
from worker.engine.draws import draw, likeliest, plan_draws

MOST = 2**53 - 1
"""The largest random number, times 2 ** 53."""


def plan(count, vocab=VOCAB, **params):
    rows = [row(do_sample=True, seed=seed, **params) for seed in range(count)]
    return plan_draws(rows, [0] * count, vocab, CPU)


def drawn_at(logits, uniforms, **params):
    """The tokens that these random numbers point at, for one row of logits."""
    (own,) = plan(1, logits.shape[1], **params)
    count = len(uniforms)
    many = own._replace(
        rows=torch.zeros(count, dtype=torch.int64),
        uniform=torch.tensor(uniforms),
        **{
            name: getattr(own, name).expand(count)
            for name in ("temperature", "top_k", "top_p", "min_p", "typical_p")
        },
    )
    return draw(logits, many).tolist()


def assert_draws(logits, probs, *, clear=1e-4, **params):
    """Each token is drawn by numbers from its own share of [0, 1) and by no others."""
    ends = probs[0].double().cumsum(0)
    starts = ends - probs[0].double()
    tokens = [token for token in range(probs.shape[1]) if probs[0, token] > clear]
    for at in (0.05, 0.5, 0.95):
        points = [float(starts[token] + at * probs[0, token]) for token in tokens]
        assert drawn_at(logits, [min(MOST, int(point * 2**53)) for point in points], **params) == tokens


def has_clear_edges(logits, **cut):
    """Whether rounding cannot change what transformers keeps."""
    kept = warped(logits.double(), **cut) > 0
    for seed, sign in ((1, 1), (2, -1), (3, 0)):
        noise = logits_of(seed, spread=1e-5, vocab=logits.shape[1]).double()
        moved = {
            name: value + sign * 1e-5 if name in {"top_p", "typical_p"} and value < 1 else value
            for name, value in cut.items()
        }
        if not torch.equal(warped(logits.double() + noise, **moved) > 0, kept):
            return False
    return True


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_each_token_has_the_share_that_transformers_gives_it(cut, seed):
    logits = logits_of(seed)
    assert_draws(logits, warped(logits, **cut), **cut)


@given(
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.1, 1.0, 3.0, 20.0]),
    vocab=st.sampled_from([2, 24, 255, 256, 257, 700, 3000]),
    temperature=st.sampled_from([0.2, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 7, 40, 500]),
    top_p=st.sampled_from([0.1, 0.7, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.5]),
    typical_p=st.sampled_from([0.2, 0.9, 1.0]),
)
@settings(max_examples=150, deadline=None)
def test_any_cuts_together_are_transformers(seed, spread, vocab, **cut):
    logits = logits_of(seed, spread=spread, vocab=vocab)
    assume(has_clear_edges(logits, **cut))
    assert_draws(logits, warped(logits.double(), **cut), clear=1e-3, **cut)


@pytest.mark.parametrize("cut", [*CUTS[:1], *CUTS[14:]], ids=str)
def test_draws_of_many_seeds_have_the_distribution(cut):
    count = 6000
    logits = logits_of(5)
    expected = warped(logits, **cut)[0] * count
    rows = [row(do_sample=True, seed=seed, **cut) for seed in range(count)]
    got = torch.zeros(VOCAB)
    for own in plan_draws(rows, [0] * count, VOCAB, CPU):
        got += draw(logits.expand(count, -1), own).bincount(minlength=VOCAB)
    assert not got[expected == 0].any()
    # Pearson's chi-square over tokens that are drawn often, the others as one; the seeds are fixed.
    often = expected >= 10
    pairs = [*zip(got[often], expected[often], strict=True), (got[~often].sum(), expected[~often].sum())]
    terms = [float((seen - share) ** 2 / share) for seen, share in pairs if share > 1]
    freedom = len(terms) - 1
    assert freedom >= 2
    # The 0.999 quantile, after Wilson and Hilferty.
    assert sum(terms) < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.39, {0}), (0.41, {0, 1}), (0.69, {0, 1}), (0.71, {0, 1, 2}), (0.99, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, kept):
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    points = [int(2**53 * number / 400) for number in range(400)]
    assert set(drawn_at(logits, points, top_p=top_p)) == kept


@pytest.mark.parametrize("cut", [{"top_k": 3}, {"top_p": 0.65}, {"typical_p": 0.65}], ids=str)
def test_equally_likely_tokens_stay_or_go_together(cut):
    logits = torch.tensor([[5.0, 0.0, 4.0, 3.0, 3.0, 0.0, 3.0]])
    points = [int(2**53 * number / 400) for number in range(400)]
    drawn = set(drawn_at(logits, points, temperature=10.0 if "top_k" in cut else 2.5, **cut))
    assert drawn >= {3, 4, 6} or not drawn & {3, 4, 6}
    if "top_k" in cut:
        assert drawn == {0, 2, 3, 4, 6}
        assert set(warped(logits, **cut).nonzero()[:, 1].tolist()) == drawn


@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 1000])
@pytest.mark.parametrize(
    "cut", [{}, {"top_k": 2}, {"top_p": 0.7}, {"typical_p": 0.5}, {"min_p": 0.9}], ids=str
)
def test_the_ends_of_the_random_numbers_point_at_tokens_that_are_left(vocab, cut):
    logits = torch.full((1, vocab), -torch.inf)
    kept = sorted({vocab // 3, 2 * vocab // 3})
    logits[0, kept] = 3.0
    assert drawn_at(logits, [0, MOST], **cut) == [kept[0], kept[-1]]


def test_a_block_whose_sum_was_rounded_up_ends_with_a_token_that_is_left():
    logits = torch.full((1, 600), -torch.inf)
    logits[0, 3], logits[0, 7] = 0.0, math.log(0.75 * 2**-23)
    assert logits.exp().sum() > logits.exp().double().sum()
    assert drawn_at(logits, [MOST]) == [7]


@pytest.mark.parametrize(
    "cut", [{"temperature": 1e-5}, {"top_k": 1}, {"top_p": 1e-30}, {"min_p": 1.0}], ids=str
)
def test_narrowest_cut_is_greedy(cut):
    logits = logits_of(3, spread=20.0)
    points = [int(2**53 * number / 200) for number in range(200)]
    assert set(drawn_at(logits, points, **cut)) == {int(logits.argmax())}


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
@pytest.mark.parametrize("size", [1e-3, 1e4])
def test_no_temperature_makes_a_number_that_is_none(temperature, size):
    logits = logits_of(1, spread=size)
    (drawn,) = drawn_at(logits, [MOST // 2], temperature=temperature, top_p=0.9)
    assert 0 <= drawn < VOCAB


def test_whole_vocabulary_of_a_real_model_can_be_drawn_from():
    points = [int(2**53 * (number + 0.501) / 200) for number in range(200)]
    drawn = drawn_at(torch.zeros(1, 128_000), points)
    assert drawn == [640 * number + 320 for number in range(200)]


def flat_and_steep(rows, vocab):
    """Rows whose top-p takes in a handful of tokens, or most of the vocabulary."""
    logits = logits_of(9, rows, spread=0.2, vocab=vocab)
    logits[::2, 17] += 12
    return logits


@pytest.mark.parametrize(
    "cut", [{"top_p": 0.9}, {"typical_p": 0.9}, {"top_p": 0.9, "typical_p": 0.5}], ids=str
)
def test_sorting_a_part_of_the_vocabulary_changes_nothing(cut, monkeypatch):
    rows = [row(do_sample=True, seed=seed, **cut) for seed in range(40)]
    logits = flat_and_steep(40, 2000)
    (own,) = plan_draws(rows, [0] * 40, 2000, CPU)
    partly = draw(logits, own)
    monkeypatch.setattr(draws, "_FEW", 2000)
    assert torch.equal(partly, draw(logits, own))


def test_slices_change_nothing(monkeypatch):
    rng = random.Random(3)
    rows = [row(do_sample=True, seed=seed, **rng.choice(CUTS)) for seed in range(60)]
    logits = logits_of(4, 60)

    def tokens():
        found = torch.full((60,), -1)
        parts = plan_draws(rows, [0] * 60, VOCAB, CPU)
        for own in parts:
            found.index_copy_(0, own.rows, draw(logits, own))
        return found.tolist(), len(parts)

    whole, few = tokens()
    monkeypatch.setattr(draws, "_CPU_ELEMENTS", 1)
    assert tokens() == (whole, 60)
    assert few < 20


def test_rows_are_grouped_by_their_cuts_alone():
    kinds = [{}, {"top_k": 5}, {"top_k": 9, "top_p": 0.5}, {"top_k": VOCAB}, {"top_p": 0.5}, {"top_k": 2}]
    rows = [row(do_sample=True, **kind) for kind in kinds] + [row(), row(top_k=3)]
    found = {tuple(own.rows.tolist()): own.most for own in plan_draws(rows, [0] * 8, VOCAB, CPU)}
    assert found == {(0, 3): 0, (1, 5): 5, (2,): 9, (4,): 0}


@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=700),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=60, deadline=None)
def test_likeliest_is_the_first_of_the_largest(values, dtype):
    scores = torch.tensor([values, values[::-1]], dtype=dtype)
    assert likeliest(scores).tolist() == [own.index(max(own)) for own in (values, values[::-1])]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("vocab", [1, 24, 256, 2001])
def test_what_is_no_number_still_gives_a_token_of_the_vocabulary(value, vocab):
    for everywhere in (False, True):
        logits = logits_of(0, 1, vocab=vocab)
        logits[0, slice(None) if everywhere else 0] = value
        assert 0 <= int(likeliest(logits)) < vocab
        for cut in CUTS:
            assert all(0 <= token < vocab for token in drawn_at(logits, [0, MOST], **cut))


def test_draws_do_not_change_the_scores():
    logits = logits_of(2)
    before = logits.clone()
    drawn = Counter(drawn_at(logits, [0, MOST], **CUTS[-1]))
    assert drawn
    assert torch.equal(logits, before)
