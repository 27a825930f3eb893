"""Rows that stream tell every token, and texts that nothing later takes back."""

import itertools

import msgspec
import pytest

from tests.engine.harness import Harness
from worker.engine.tokenizer import TextStream
from worker.jobs import Completion, Delta, InferenceRequest, SamplingParams

PROMPT = (72, 101, 108, 108, 111)


@pytest.fixture(scope="module")
def harness(llama):
    return Harness(llama, max_num_seqs=6, max_num_batched_tokens=32)


def streaming(name, prompt=PROMPT, **params):
    params = SamplingParams(**{"max_new_tokens": 24, "ignore_eos": True, "details": True, **params})
    return InferenceRequest(id=name, prompt=prompt, params=params, interactive=True, streams=True)


def follow(harness: Harness, *requests: InferenceRequest) -> dict[str, tuple[list[Delta], Completion]]:
    """What each said on the way, and at its end."""
    deltas, ended = {request.id: [] for request in requests}, {}
    for request in requests:
        harness.engine.add(request)
    while harness.engine.has_work:
        completions, _ = harness.engine.step()
        for delta in harness.engine.take_deltas():
            assert delta.request_id not in ended
            deltas[delta.request_id].append(delta)
        ended |= {completion.request_id: completion for completion in completions}
    harness.engine.check_integrity()
    return {name: (said, ended[name]) for name, said in deltas.items()}


def check(said: list[Delta], completion: Completion) -> None:
    """The deltas are the completion, but for its last token and what that makes certain."""
    assert tuple(delta.token for delta in said) == completion.token_ids[:-1]
    assert tuple(delta.log_prob for delta in said) == completion.log_probs[:-1]
    assert completion.text.startswith("".join(delta.text for delta in said))


@pytest.mark.parametrize("seed", range(6))
def test_tokens_and_texts_are_those_of_the_completion(harness, seed):
    rows = [streaming(f"{n}", tuple(range(n, n + 5)), do_sample=True, seed=seed + n) for n in range(8)]
    rows.append(msgspec.structs.replace(streaming("quiet"), streams=False))
    followed = follow(harness, *rows)
    assert followed.pop("quiet")[0] == []
    for said, completion in followed.values():
        check(said, completion)
    assert any(delta.text for said, _ in followed.values() for delta in said)


def test_what_may_be_the_begin_of_a_stop_sequence_is_held_back(harness):
    whole = follow(harness, streaming("whole", do_sample=True, seed=3))["whole"][1].text
    cuts = [(n, n + size) for size in (1, 2, 4) for n in range(0, len(whole) - size, 3)]
    for stops in ([whole[begin:end]] for begin, end in cuts):
        followed = follow(harness, streaming("row", do_sample=True, seed=3, stop_sequences=tuple(stops)))
        said, completion = followed["row"]
        check(said, completion)
        assert completion.text == whole[: whole.index(stops[0])]


def test_every_text_is_told_whole_unless_a_stop_sequence_may_begin(harness):
    for text, stops in itertools.product(("abcab", "héé", "aab"), ((), ("abd",), ("aac", "ba"))):
        stream = TextStream(harness.base.tokenizer, PROMPT)
        told = ""
        for token in harness.base.tokenizer.encode(text):
            stream.push(token)
            told += stream.tell(stops)
            assert stream.text.startswith(told)
            rest = stream.text[len(told) :]
            assert any(stop.startswith(rest) for stop in stops) or not rest
            begun = (n for stop in stops for n in range(1, len(stop)) if stream.text.endswith(stop[:n]))
            assert len(rest) == max(begun, default=0)


def test_a_row_that_begins_anew_says_nothing_twice(harness):
    alone, _ = follow(harness, streaming("row"))["row"]
    harness.engine.add(streaming("row"))
    for _ in range(5):
        harness.engine.step()
    scheduler = harness.engine._scheduler
    scheduler.preempt(scheduler.running[0])
    assert not scheduler.running
    said, ended = [], []
    while not ended:
        ended, _ = harness.engine.step()
        said += harness.engine.take_deltas()
    assert [(delta.token, delta.text) for delta in said] == [(delta.token, delta.text) for delta in alone]
    check(said, ended[0])


def test_a_row_that_is_dropped_says_no_more(harness):
    harness.engine.add(streaming("gone"))
    harness.engine.step()
    harness.engine.step()
    assert harness.engine.take_deltas()
    harness.engine.abort("gone")
    assert not harness.engine.take_deltas()
    harness.engine.check_integrity()
