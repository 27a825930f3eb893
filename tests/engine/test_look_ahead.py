"""Steps that are launched before the last is known: the same rows, token for token."""

import random

import pytest
import torch

from worker.engine.cache_size import CacheShape
from worker.errors import EngineFailed
from worker.jobs import FinishReason, InferenceRequest, SamplingParams

OWN, SHARED, TIGHT = CacheShape(6, 160), CacheShape(60, 16), CacheShape(20, 8)


def requests(keys, **params):
    rng = random.Random(0)
    return [
        InferenceRequest(
            id=f"row{number}",
            prompt=tuple(rng.randrange(256) for _ in range(rng.choice([1, 2, 7, 30]))),
            adapter=rng.choice(keys),
            params=SamplingParams(**{"max_new_tokens": rng.choice([1, 2, 9, 20]), "details": True, **params}),
        )
        for number in range(18)
    ]


def told(completions):
    return {name: (done.token_ids, done.text, done.finish_reason) for name, done in completions.items()}


def both(make_harness, llama, adapters, shape, rows):
    answers = []
    for look_ahead in (False, True):
        harness = make_harness(
            llama, max_num_seqs=6, max_num_batched_tokens=24, cache_shape=shape, look_ahead=look_ahead
        )
        harness.engine._scheduler.lengths.ratio = 0.0  # rows are let in that will not all fit
        keys = [None, *map(harness.adapter, adapters[:5])]
        answers.append((harness.run(rows(keys)), harness.stats[-1]))
    (plain, _), (ahead, _) = answers
    assert told(ahead) == told(plain)
    for name, done in plain.items():
        assert ahead[name].prompt_log_probs == pytest.approx(done.prompt_log_probs, abs=1e-3)
    return [stats for _, stats in answers]


@pytest.mark.parametrize("shape", [OWN, SHARED, TIGHT], ids=["own", "shared", "preempting"])
def test_rows_are_the_same_as_step_by_step(llama, make_harness, adapters, shape):
    stats = both(make_harness, llama, adapters, shape, lambda keys: requests(keys, max_new_tokens=20))
    if shape is TIGHT:
        assert all(own.preempted > 0 for own in stats)


@pytest.mark.parametrize(
    "params",
    [
        {"do_sample": True, "temperature": 1.5, "top_k": 30},
        {"repetition_penalty": 1.7, "frequency_penalty": 0.5},
        {"prompt_log_probs": True},
        {"min_new_tokens": 3},
    ],
)
def test_what_depends_on_earlier_tokens_is_the_same(llama, make_harness, adapters, params):
    both(make_harness, llama, adapters, SHARED, lambda keys: requests(keys, **params))


def test_row_that_ends_early_leaves_no_trace(llama, make_harness, adapters):
    """Its next token is under way when its end is found out."""
    harness = make_harness(llama, look_ahead=True)
    plain = harness.run(requests([None], ignore_eos=True, max_new_tokens=12))
    text = plain["row3"].text[4:8]
    stops = [
        InferenceRequest(
            id=row.id,
            prompt=row.prompt,
            params=SamplingParams(max_new_tokens=12, ignore_eos=True, stop_sequences=(text,)),
        )
        for row in requests([None])
    ]
    done = harness.run(stops)
    assert done["row3"].finish_reason is FinishReason.STOP_SEQUENCE
    assert text not in done["row3"].text
    for name, own in done.items():
        assert plain[name].token_ids[: len(own.token_ids)] == own.token_ids
    assert not harness.engine.has_work


def test_only_tokens_that_rows_got_are_counted(llama, make_harness):
    """Not what was under way for rows that had ended, or failed, when it came."""
    harness = make_harness(llama, look_ahead=True)
    plain = harness.run(requests([None], ignore_eos=True, max_new_tokens=12))
    assert sum(stats.generated_tokens for stats in harness.stats) == 18 * 12
    harness.stats.clear()
    ends = {name: done.token_ids[number % 12] for number, (name, done) in enumerate(sorted(plain.items()))}
    rows = [
        InferenceRequest(
            id=row.id,
            prompt=row.prompt,
            params=SamplingParams(max_new_tokens=12, ignore_eos=True, stop_token_ids=(ends[row.id],)),
        )
        for row in requests([None])
    ]
    calls = []

    def spoil_the_fourth(_module, _args, output):
        calls.append(1)
        if len(calls) == 4:
            output[0, 0] = torch.nan

    handle = harness.base.model.get_input_embeddings().register_forward_hook(spoil_the_fourth)
    done = harness.run(rows)
    handle.remove()
    assert {own.finish_reason for own in done.values()} == {FinishReason.ERROR, FinishReason.STOP_SEQUENCE}
    got = sum(len(own.token_ids) for own in done.values())
    assert sum(stats.generated_tokens for stats in harness.stats) == got


def test_aborted_row_under_way_is_forgotten(llama, make_harness):
    harness = make_harness(llama, look_ahead=True)
    expected = told(harness.run(requests([None])))
    for row in requests([None]):
        harness.engine.add(row)
    done = {}
    for number in range(200):
        ended, _ = harness.engine.step()
        done |= {own.request_id: own for own in ended}
        if number == 1:
            harness.engine.abort("row0")
        harness.engine.check_integrity()
        if not harness.engine.has_work:
            break
    done.pop("row0", None)  # it may have been quicker
    del expected["row0"]
    assert told(done) == expected


def test_step_that_cannot_be_launched_fails_its_row_only(llama, make_harness):
    harness = make_harness(llama, look_ahead=True)
    rows = requests([None], ignore_eos=True)
    plain = harness.run(rows)
    expected = told(plain)
    said = {token for done in plain.values() for token in done.token_ids}
    poison = next(
        token for token in range(256) if token not in said and all(token not in row.prompt for row in rows)
    )
    embedding = harness.base.model.get_input_embeddings()

    def refuse(_module, args, _output):
        if (args[0] == poison).any():
            raise RuntimeError("poisoned")

    handle = embedding.register_forward_hook(refuse)
    bad = InferenceRequest(id="bad", prompt=(3, poison, 4), params=SamplingParams(max_new_tokens=4))
    done = harness.run([*rows[:5], bad, *rows[5:]])
    handle.remove()
    assert done.pop("bad").failure.code == "internal"
    assert told(done) == expected


def test_device_that_fails_under_way_ends_the_engine(llama, make_harness, monkeypatch):
    harness = make_harness(llama, look_ahead=True)

    def fail(_launched):
        raise torch.AcceleratorError("lost")

    monkeypatch.setattr(harness.runner, "collect", fail)
    with pytest.raises(EngineFailed, match="under way: lost"):
        harness.run(requests([None]))
