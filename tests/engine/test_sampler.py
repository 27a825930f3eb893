"""Logits -> tokens: transformers' cuts, and draws that depend on nothing but the row itself."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from worker.engine.sampler import sample
from worker.engine.sequence import Sequence
from worker.jobs import InferenceRequest, SamplingParams

VOCAB = 24
DRAWS = 6000


def row(name="row", *, prompt=(1, 2, 3), generated=(), **params):
    sequence = Sequence(InferenceRequest(id=name, prompt=prompt, params=SamplingParams(**params)))
    for token in generated:
        sequence.append(token, None)
    return sequence


def logits_of(seed, rows=1, spread=2.0):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def tokens(logits, rows):
    return [own.token for own in sample(logits, rows)]


def draws(logits, count=DRAWS, **params):
    """How often each token is drawn from one row of logits, over as many seeds."""
    rows = [row(do_sample=True, seed=seed, **params) for seed in range(count)]
    return Counter(tokens(logits.expand(count, -1), rows))


def reference(logits, prompt=(1, 2, 3), *, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0):
    """The distribution [vocabulary] that transformers' `generate` draws from."""
    processors = LogitsProcessorList()
    if repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    if temperature != 1.0:
        processors.append(TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        processors.append(TopPLogitsWarper(top_p))
    return processors(torch.tensor([prompt]), logits.clone()).softmax(dim=-1)[0]


CUTS = [
    {},
    {"temperature": 0.3},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": VOCAB},
    {"top_k": 10 * VOCAB},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 1e-9},
    {"temperature": 2.0, "top_k": 12, "top_p": 0.8},
    {"temperature": 0.5, "top_k": 3, "top_p": 0.99},
    {"temperature": 4.0, "top_p": 0.6, "repetition_penalty": 1.7},
    {"top_k": 8, "repetition_penalty": 0.6},
]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_draws_follow_transformers_distribution(cut):
    logits = logits_of(5)
    expected, counts = reference(logits, **cut), draws(logits, **cut)
    kept = {token for token in range(VOCAB) if expected[token] > 0}
    assert set(counts) <= kept
    assert {token for token in kept if expected[token] > 20 / DRAWS} <= set(counts)
    for token in kept:
        share = float(expected[token])
        deviation = (share * (1 - share) / DRAWS) ** 0.5
        assert abs(counts[token] / DRAWS - share) <= 4.5 * deviation + 1e-9, token


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.39, {0}), (0.41, {0, 1}), (0.69, {0, 1}), (0.71, {0, 1, 2}), (0.99, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, kept):
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert set(draws(logits, 300, top_p=top_p)) == kept


@pytest.mark.parametrize("top_k", [1, 2, 3, 7])
def test_top_k_keeps_as_many_tokens_even_among_equals(top_k):
    assert len(draws(torch.zeros(1, VOCAB), 2000, top_k=top_k)) == top_k


def test_greedy_takes_the_likeliest_token_whatever_the_other_parameters():
    logits = logits_of(0, rows=5)
    rows = [row(do_sample=False, temperature=9.0, top_k=3, top_p=0.1, seed=seed) for seed in range(5)]
    assert tokens(logits, rows) == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("cut", [{"temperature": 1e-5}, {"top_k": 1}, {"top_p": 1e-30}], ids=str)
def test_narrowest_cut_is_greedy(cut):
    logits = logits_of(3, spread=20.0)
    assert set(draws(logits, 200, **cut)) == {int(logits.argmax())}


def test_whole_vocabulary_of_a_real_model_can_be_drawn_from():
    logits = torch.zeros(1, 128_000)
    rows = [row(do_sample=True, seed=seed) for seed in range(200)]
    drawn = tokens(logits.expand(200, -1), rows)
    assert len(set(drawn)) > 190
    assert max(drawn) > 120_000
    assert min(drawn) < 8_000


@given(
    seed=st.integers(0, 10_000),
    penalty=st.sampled_from([0.5, 0.9, 1.1, 2.0, 10.0]),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12),
    generated=st.lists(st.integers(0, VOCAB - 1), max_size=12),
)
@settings(max_examples=80, deadline=None)
def test_repetition_penalty_is_transformers_over_prompt_and_generated_tokens(
    seed, penalty, prompt, generated
):
    logits = logits_of(seed)
    seen = torch.tensor([prompt + generated])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(seen, logits.clone())
    own = row(prompt=tuple(prompt), generated=generated, repetition_penalty=penalty)
    plain = row("plain", prompt=tuple(prompt), generated=generated)
    assert tokens(logits.repeat(2, 1), [own, plain]) == [int(expected.argmax()), int(logits.argmax())]


# What a draw depends on


def crowd(count):
    """Rows with parameters, seeds and steps of every kind."""
    rng = random.Random(count)
    for number in range(count):
        cut = rng.choice([*CUTS, {"do_sample": False}])
        yield row(
            f"row{number}",
            generated=[rng.randrange(VOCAB) for _ in range(rng.randrange(4))],
            **{"do_sample": True, "details": rng.random() < 0.5, "seed": rng.choice([None, 1, 2]), **cut},
        )


@given(order=st.permutations(range(20)), data=st.data())
@settings(max_examples=40, deadline=None)
def test_row_draws_the_same_alone_and_in_any_company(order, data):
    rows, logits = list(crowd(20)), logits_of(2, rows=20)
    alone = [sample(logits[number : number + 1], [rows[number]])[0] for number in range(20)]
    company = order[: data.draw(st.integers(1, 20))]
    mixed = sample(logits[company], [rows[number] for number in company])
    assert [own.token for own in mixed] == [alone[number].token for number in company]
    for own, number in zip(mixed, company, strict=True):
        assert own.finite
        assert own.log_prob == (
            None if alone[number].log_prob is None else pytest.approx(alone[number].log_prob)
        )


def test_draw_changes_with_the_step():
    logits = torch.zeros(40, VOCAB)
    rows = [row(do_sample=True, seed=1, generated=[0] * step) for step in range(40)]
    assert len(set(tokens(logits, rows))) > 10


def test_draw_does_not_depend_on_what_was_drawn_before_nor_on_the_prompt():
    logits = torch.zeros(3, VOCAB)
    rows = [
        row("a", do_sample=True, seed=1, generated=[4, 5]),
        row("b", do_sample=True, seed=1, generated=[6, 7]),
        row("c", do_sample=True, seed=1, generated=[6, 7], prompt=(9,)),
    ]
    assert len(set(tokens(logits, rows))) == 1


def test_without_a_seed_the_id_is_the_seed():
    logits = torch.zeros(60, VOCAB)
    names = [f"row{number // 2}" for number in range(60)]
    drawn = tokens(logits, [row(name, do_sample=True) for name in names])
    assert drawn[::2] == drawn[1::2]
    assert len(set(drawn)) > 10


def test_seed_and_id_of_the_same_text_differ():
    logits = torch.zeros(2, 100_000)
    by_seed, by_id = tokens(logits, [row("x", do_sample=True, seed=7), row("7", do_sample=True)])
    assert by_seed != by_id


# Log-probabilities


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_prob_is_the_models_own_before_any_cut(dtype):
    logits = logits_of(4, rows=20).to(dtype)
    rows = list(crowd(20))
    expected = logits.float().log_softmax(dim=-1)
    for number, own in enumerate(sample(logits, rows)):
        if rows[number].request.params.details:
            assert own.log_prob == pytest.approx(float(expected[number, own.token]), abs=1e-6)
        else:
            assert own.log_prob is None


# Failure


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_row_that_is_not_finite_is_told_apart_and_hurts_nobody(value):
    rows, logits = list(crowd(20)), logits_of(2, rows=20)
    expected = sample(logits, rows)
    for number in (0, 7, 19):
        logits[number, 5] = value
    logits[8] = value
    for number, own in enumerate(sample(logits, rows)):
        assert own.finite == (number not in {0, 7, 8, 19})
        assert 0 <= own.token < VOCAB
        if own.finite:
            assert own == expected[number]


def test_logits_are_not_changed():
    rows, logits = list(crowd(20)), logits_of(2, rows=20)
    before = logits.clone()
    sample(logits, rows)
    assert torch.equal(logits, before)
