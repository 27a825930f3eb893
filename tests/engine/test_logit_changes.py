"""What is done to logits before a token is chosen: transformers' processors, and OpenAI's penalties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinNewTokensLengthLogitsProcessor

from tests.engine.sampling import VOCAB, logits_of, penalized, row
from worker.engine.logit_changes import _with_latest, change, plan_allowed, plan_changes, restrict

EOS = {0, 5}


def changed(logits, rows, pending=None, latest=None, eos=()):
    scores = logits.clone()
    allowed = plan_allowed(rows)
    if allowed is not None:
        restrict(scores, allowed)
    changes = plan_changes(rows, pending or [0] * len(rows), logits.shape[1], eos)
    if changes is not None:
        change(scores, changes, latest)
    return scores


some_tokens = st.lists(st.integers(0, VOCAB - 1), max_size=12)
biases = st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -1.5, 0.5, 100.0]), max_size=4)
parameters = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.sampled_from([0.5, 0.9, 1.1, 2.0, 10.0]),
        "frequency_penalty": st.sampled_from([-2.0, -0.3, 0.7, 2.0]),
        "presence_penalty": st.sampled_from([-2.0, -0.3, 0.7, 2.0]),
        "logit_bias": biases.map(lambda found: tuple(found.items())),
        "allowed_token_ids": st.sets(st.integers(0, VOCAB - 1), min_size=1).map(tuple),
    },
)
histories = st.tuples(some_tokens.map(lambda tokens: (1, *tokens)), some_tokens, parameters)


@given(histories, st.integers(0, 10_000))
@settings(max_examples=150, deadline=None)
def test_changes_are_transformers_and_openais_in_order(history, seed):
    prompt, generated, params = history
    logits = logits_of(seed)
    got = changed(logits, [row(prompt=prompt, generated=generated, **params)])
    torch.testing.assert_close(got, penalized(logits, prompt, generated, **params), rtol=1e-6, atol=1e-6)


@given(st.lists(histories, min_size=1, max_size=8), st.integers(0, 10_000))
@settings(max_examples=80, deadline=None)
def test_rows_are_changed_as_each_by_itself(histories, seed):
    rows = [row(prompt=prompt, generated=generated, **params) for prompt, generated, params in histories]
    logits = logits_of(seed, len(rows))
    alone = [changed(logits[number : number + 1], [own]) for number, own in enumerate(rows)]
    assert torch.equal(changed(logits, rows, eos=EOS), torch.cat(alone))


@given(
    st.lists(st.tuples(histories, st.booleans(), st.integers(-1, VOCAB - 1)), min_size=1, max_size=8),
    st.integers(0, 10_000),
    st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_a_token_that_only_the_device_knows_counts_like_any_other(found, seed, least):
    logits = logits_of(seed, len(found))
    known, unknown, pending, latest = [], [], [], []
    for (prompt, generated, drawn), waits, token in found:
        params = drawn | {"min_new_tokens": least}
        last = max(token, 0) if waits else token
        known.append(row(prompt=prompt, generated=[*generated, last] if waits else generated, **params))
        unknown.append(row(prompt=prompt, generated=generated, **params))
        pending.append(int(waits))
        latest.append(last)
    got = changed(logits, unknown, pending, torch.tensor(latest), eos=EOS)
    assert torch.equal(got, changed(logits, known, eos=EOS))
    changes = plan_changes(unknown, pending, VOCAB, EOS)
    if changes is not None and changes.needs_latest:  # a device may write them in any order
        entries = zip(
            *(own.tolist() for own in _with_latest(changes, torch.tensor(latest).clamp(min=0))), strict=True
        )
        written = {}
        for where, token, *what in entries:
            assert written.setdefault((where, token), what) == what


def test_first_generated_token_is_penalized_although_only_the_device_knows_it():
    logits = torch.zeros(1, VOCAB)
    got = changed(logits, [row(presence_penalty=1.0)], [1], torch.tensor([7]))
    assert got.nonzero()[:, 1].tolist() == [7]
    assert got[0, 7] == -1.0


def test_no_newest_token_is_not_the_last_of_the_vocabulary():
    logits = torch.zeros(2, VOCAB)
    rows = [row(presence_penalty=1.0, generated=[VOCAB - 1]), row(presence_penalty=1.0)]
    got = changed(logits, rows, [0, 1], torch.tensor([-1, 7]))
    assert got.nonzero().tolist() == [[0, VOCAB - 1], [1, 7]]


def test_a_penalty_needs_the_newest_token():
    with pytest.raises(AssertionError, match="newest"):
        changed(torch.zeros(1, VOCAB), [row(presence_penalty=1.0)], [1])


def test_a_bias_does_without_the_newest_token():
    assert changed(torch.zeros(1, VOCAB), [row(logit_bias=((4, 2.0),))], [1])[0, 4] == 2.0


def test_prompt_counts_for_repetition_alone():
    logits = torch.ones(1, VOCAB)
    own = {"prompt": [3, 3], "generated": [4, 4, 4]}
    assert changed(logits, [row(repetition_penalty=2.0, **own)])[0, 3:6].tolist() == [0.5, 0.5, 1.0]
    assert changed(logits, [row(frequency_penalty=0.5, **own)])[0, 3:6].tolist() == [1.0, -0.5, 1.0]
    assert changed(logits, [row(presence_penalty=0.5, **own)])[0, 3:6].tolist() == [1.0, 0.5, 1.0]


@pytest.mark.parametrize("generated", range(5))
def test_until_min_new_tokens_no_eos_as_in_transformers(generated):
    logits, ids = logits_of(1), torch.tensor([[1, 2, 3, *[9] * generated]])
    expected = MinNewTokensLengthLogitsProcessor(3, 3, sorted(EOS))(ids, logits)
    for pending in {0, min(1, generated)}:
        own = row(generated=[9] * (generated - pending), min_new_tokens=3)
        assert torch.equal(changed(logits, [own], [pending], torch.tensor([9]), eos=EOS), expected)


@pytest.mark.parametrize(
    ("params", "out"),
    [
        ({}, EOS),
        ({"stop_token_ids": (7, 8)}, EOS | {7, 8}),
        ({"stop_token_ids": (7,), "ignore_eos": True}, {7}),
        ({"ignore_eos": True}, set()),
        ({"allowed_token_ids": (0, 9)}, set(range(VOCAB)) - {9}),
        ({"logit_bias": ((5, 100.0),)}, EOS),
    ],
)
def test_until_min_new_tokens_nothing_that_would_end_the_row(params, out):
    got = changed(torch.zeros(1, VOCAB), [row(min_new_tokens=1, **params)], eos=EOS)
    assert set(torch.isinf(got).nonzero()[:, 1].tolist()) == out


def test_tokens_that_the_model_cannot_write_are_passed_over():
    logits = logits_of(1)
    own = row(prompt=(1, VOCAB, VOCAB + 900), repetition_penalty=2.0)
    assert torch.equal(changed(logits, [own]), changed(logits, [row(prompt=(1,), repetition_penalty=2.0)]))


def test_rows_without_parameters_have_no_plan():
    rows = [row(), row(do_sample=True, top_p=0.5), row(min_new_tokens=1, generated=[4])]
    assert plan_changes(rows, [0, 1, 0], VOCAB, EOS) is None
    assert plan_allowed(rows) is None
