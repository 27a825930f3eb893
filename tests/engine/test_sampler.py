"""Logits -> tokens: what a row gets depends on nothing but the row, and nobody waits for the device."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.sampling import CPU, CUTS, VOCAB, logits_of, row, sample
from worker.engine.sampler import SamplingPlan, check, choose, collect, fetch, prepare
from worker.errors import InvalidParameters
from worker.jobs import MAX_TOP_N_TOKENS, SamplingParams

EOS = {0, 5}


def tokens(logits, rows):
    return [own.token for own in sample(logits, rows)]


def crowd(count, vocab=VOCAB):
    """Rows with parameters, seeds and steps of every kind."""
    rng = random.Random(count)
    changes = [
        {"repetition_penalty": 1.3},
        {"frequency_penalty": 0.5, "presence_penalty": -0.5},
        {"logit_bias": ((3, 2.0), (4, -100.0))},
        {"allowed_token_ids": (2, 3, 5, 7)},
        {"min_new_tokens": 2, "stop_token_ids": (6,)},
    ]
    for number in range(count):
        told = rng.choice([{}, {"details": True}, {"details": True, "top_n_tokens": rng.choice([1, 3, 20])}])
        yield row(
            f"row{number}",
            generated=[rng.randrange(vocab) for _ in range(rng.randrange(4))],
            do_sample=rng.random() < 0.7,
            seed=rng.choice([None, 1, 2]),
            **told,
            **rng.choice(CUTS),
            **rng.choice([{}, {}, *changes]),
        )


# What a draw depends on


@given(order=st.permutations(range(20)), data=st.data())
@settings(max_examples=40, deadline=None)
def test_row_gets_the_same_alone_and_in_any_company(order, data):
    rows, logits = list(crowd(20)), logits_of(2, rows=20)
    alone = [sample(logits[number : number + 1], [rows[number]])[0] for number in range(20)]
    company = order[: data.draw(st.integers(1, 20))]
    mixed = sample(logits[company], [rows[number] for number in company])
    assert mixed == [alone[number] for number in company]


def test_rows_of_padding_and_greedy_neighbours_change_nothing():
    rows, logits = list(crowd(20)), logits_of(2, rows=30)
    plan = prepare(rows, VOCAB, CPU)
    assert collect(choose(logits, plan))[:20] == sample(logits[:20], rows)
    greedy = [row(f"greedy{number}") for number in range(10)]
    assert sample(logits, [*rows, *greedy])[:20] == sample(logits[:20], rows)


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


def test_a_seed_draws_the_same_in_every_version():
    rows = [row(do_sample=True, seed=seed, generated=[0] * (seed % 3)) for seed in range(8)]
    assert tokens(torch.zeros(8, 1000), rows) == [93, 518, 483, 954, 92, 792, 447, 971]


def test_greedy_takes_the_likeliest_token_whatever_the_cuts():
    logits = logits_of(0, rows=5)
    rows = [row(temperature=9.0, top_k=3, top_p=0.1, min_p=0.5, typical_p=0.2, seed=n) for n in range(5)]
    assert tokens(logits, rows) == logits.argmax(dim=-1).tolist()


def test_greedy_rows_feel_penalties_and_limits():
    logits = torch.zeros(3, VOCAB)
    logits[:, 5], logits[:, 6], logits[:, 7] = 3.0, 2.0, 1.0
    rows = [
        row(generated=[5], repetition_penalty=2.0),
        row(allowed_token_ids=(2, 7)),
        row(stop_token_ids=(6,), min_new_tokens=1),
    ]
    plan = prepare(rows, VOCAB, CPU, eos_token_ids=EOS)
    assert [own.token for own in collect(choose(logits, plan))] == [6, 7, 7]


# One step ahead of the host


def test_rows_may_be_planned_before_their_newest_token_is_known():
    rows, logits = list(crowd(20)), logits_of(2, rows=20)
    first = choose(logits, prepare(rows, VOCAB, CPU, eos_token_ids=EOS))
    pending = [number % 2 for number in range(20)]
    ahead = prepare(rows, VOCAB, CPU, eos_token_ids=EOS, pending=pending)
    then = logits_of(3, rows=20)
    got = collect(choose(then, ahead, first.tokens))
    for number, own in enumerate(collect(first)):
        if pending[number]:
            rows[number].append(own.token, None)
    assert got == collect(choose(then, prepare(rows, VOCAB, CPU, eos_token_ids=EOS)))


def test_nothing_in_choose_asks_the_device():
    """On this device there are no numbers: whoever asks for one, or for a shape they decide, raises."""
    rows, meta = list(crowd(40)), torch.device("meta")
    pending = [number % 2 for number in range(40)]
    for own, pend in ((rows, pending), (rows, None), ([row() for _ in range(40)], None)):
        plan = prepare(own, VOCAB, meta, eos_token_ids=EOS, pending=pend)
        logits = torch.empty(40, VOCAB, dtype=torch.bfloat16, device=meta)
        sampled = choose(logits, plan, torch.empty(40, dtype=torch.int64, device=meta))
        assert sampled.tokens.shape == (40,)
        assert sampled.finite.shape == (40,)
        assert (sampled.tokens.dtype, sampled.finite.dtype) == (torch.int64, torch.bool)
    asked = sum(own.request.params.details for own in rows)
    sampled = choose(logits, prepare(rows, VOCAB, meta))
    assert sampled.log_probs.shape == (asked,)
    assert sampled.log_probs.dtype == torch.float32
    assert sampled.top_tokens.shape == sampled.top_log_probs.shape == (asked, MAX_TOP_N_TOKENS)


def test_plan_of_greedy_rows_is_empty():
    rows = [row(temperature=0.5, top_p=0.5, seed=3, stop_sequences=("x",), max_new_tokens=4)] * 3
    assert prepare(rows, VOCAB, CPU, eos_token_ids=EOS) == SamplingPlan()


def test_on_the_host_there_is_nothing_to_fetch():
    sampled = choose(logits_of(1), prepare([row()], VOCAB, CPU))
    assert fetch(sampled) is sampled


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("vocab", [VOCAB, 5000])
def test_a_gpu_chooses_the_same_and_is_never_waited_for(vocab):
    cuda = torch.device("cuda")
    rows, logits = list(crowd(60, vocab)), logits_of(2, rows=60, vocab=vocab)
    pending = [number % 2 for number in range(60)]
    latest = torch.arange(60) % VOCAB
    plan = prepare(rows, vocab, CPU, eos_token_ids=EOS, pending=pending)
    expected = collect(choose(logits, plan, latest))
    there, newest = logits.to(cuda), latest.to(cuda)
    choose(there, prepare(rows, vocab, cuda, pending=pending), newest)  # loads what it needs
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan = prepare(rows, vocab, cuda, eos_token_ids=EOS, pending=pending)
        sampled = fetch(choose(there, plan, newest))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for own, other in zip(collect(sampled), expected, strict=True):
        assert (own.token, own.finite) == (other.token, other.finite)
        assert (own.log_prob is None) == (other.log_prob is None)
        if own.log_prob is not None:
            assert own.log_prob == pytest.approx(other.log_prob, abs=1e-4)
        if own.top_tokens is not None:
            assert [token for token, _ in own.top_tokens] == [token for token, _ in other.top_tokens]


# Log-probabilities


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_are_the_models_own_before_any_cut(dtype):
    logits = logits_of(4, rows=20).to(dtype)
    rows = list(crowd(20))
    expected = logits.float().log_softmax(dim=-1)
    for number, own in enumerate(sample(logits, rows)):
        params = rows[number].request.params
        if not params.details:
            assert own.log_prob is None
        else:
            assert own.log_prob == pytest.approx(float(expected[number, own.token]), abs=1e-6)
        if not params.top_n_tokens:
            assert own.top_tokens is None
        else:
            best = expected[number].topk(params.top_n_tokens)
            ids, log_probs = zip(*own.top_tokens, strict=True)
            assert expected[number, list(ids)].tolist() == best.values.tolist()
            assert log_probs == pytest.approx(best.values.tolist(), abs=1e-6)


def test_alternatives_come_with_the_tokens_log_prob_and_end_with_the_vocabulary():
    (own,) = sample(torch.tensor([[0.0, 2.0, 1.0]]), [row(top_n_tokens=20)])
    assert own.log_prob is not None
    assert own.top_tokens[0] == (own.token, own.log_prob)
    assert [token for token, _ in own.top_tokens] == [1, 2, 0]


def test_neighbours_do_not_choose_among_equally_likely_alternatives():
    logits = torch.zeros(2, 1000)
    logits[:, ::3] = 1.0
    asked = [row(top_n_tokens=2), row(top_n_tokens=20)]
    assert sample(logits, asked)[:1] == sample(logits[:1], asked[:1])


# Parameters that only the model can judge


@pytest.mark.parametrize(
    "params",
    [
        {"logit_bias": ((3, 1.0), (VOCAB, 1.0))},
        {"allowed_token_ids": (VOCAB, 3)},
        {"stop_token_ids": (VOCAB,)},
    ],
)
def test_tokens_that_the_model_does_not_have_are_refused(params):
    (name,) = params
    with pytest.raises(
        InvalidParameters, match=f"{name} has token {VOCAB}; the base model has {VOCAB} tokens"
    ):
        check(SamplingParams(**params), VOCAB, EOS)
    check(SamplingParams(**params), VOCAB + 1, EOS)


def test_a_row_that_could_neither_end_nor_go_on_is_refused():
    allowed = {"allowed_token_ids": (0, 5, 7), "min_new_tokens": 2}
    check(SamplingParams(**allowed), VOCAB, EOS)
    check(SamplingParams(**allowed | {"stop_token_ids": (7,), "ignore_eos": True}), VOCAB, EOS)
    check(SamplingParams(**allowed | {"stop_token_ids": (7,), "min_new_tokens": 0}), VOCAB, EOS)
    with pytest.raises(InvalidParameters, match="min_new_tokens is 2, and every one of allowed_token_ids"):
        check(SamplingParams(**allowed | {"stop_token_ids": (7,)}), VOCAB, EOS)


# Failure


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_row_that_is_not_finite_is_told_apart_and_hurts_nobody(value, dtype):
    rows, logits = list(crowd(20)), logits_of(2, rows=20).to(dtype)
    logits[3] = 65504.0 / 2
    expected = sample(logits, rows)
    for number in (0, 7, 19):
        logits[number, 5] = value
    logits[8] = value
    for number, own in enumerate(sample(logits, rows)):
        assert own.finite == (number not in {0, 7, 8, 19})
        assert 0 <= own.token < VOCAB
        if own.finite:
            assert own == expected[number]


def test_infinities_of_both_signs_do_not_cancel():
    logits = logits_of(2)
    logits[0, 3], logits[0, 4] = torch.inf, -torch.inf
    assert not sample(logits, [row()])[0].finite


def test_logits_are_not_changed():
    for dtype in (torch.float32, torch.bfloat16):
        rows, logits = list(crowd(20)), logits_of(2, rows=20).to(dtype)
        before = logits.clone()
        sample(logits, rows)
        assert torch.equal(logits, before)
