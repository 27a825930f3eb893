"""Whoever accounts for messages notices what is amiss."""

import hashlib
import json

import pytest

from tests.poison import samples
from tests.poison.accounts import Bucket, account
from tests.poison.messages import Message

LINES = b'{"index": 0, "error": null}\n{"index": 1, "error": null}\n'
BODY = '{"id": "a", "inputs": ["x", "y"]}'


def manifest(status="completed", job_id="a", **changes):
    fields = {
        "job_id": job_id,
        "status": status,
        "request_counts": {"total": 2, "completed": 2, "failed": 0},
        "error_counts": {},
        "outputs": [{"uri": "s3://mill/out/a/r.jsonl", "sha256": hashlib.sha256(LINES).hexdigest()}],
        "error": None,
    }
    return json.dumps(fields | changes).encode()


def letter(body):
    return json.dumps({"body": body}).encode()


def books(results=None, letters=None, body=BODY, ends="", attributes=None):
    message = Message(body, attributes or {}, ends=ends, kind="good")
    return account({"m-1": message}, Bucket(results or {}, letters or {}))


DONE = {"a/manifest.json": manifest(), "a/r.jsonl": LINES}


def test_what_is_committed_is_counted_with_its_rows():
    found = books(DONE, ends="completed")
    assert (found.tally, found.rows, found.mistakes) == ({("good", "completed"): 1}, {"": 2}, [])


def test_a_message_may_go_by_its_own_id():
    found = books({"m-1/manifest.json": manifest("failed", "m-1")}, body='{"inputs": 5}', ends="refused")
    assert (found.tally, found.mistakes) == ({("good", "failed"): 1}, [])


def test_an_output_may_lie_deeper():
    assert books({f"deep/er/{key}": body for key, body in DONE.items()}, ends="completed").mistakes == []


def test_a_dead_letter_is_an_end_and_has_the_message():
    assert books(letters={"m-1.json": letter(BODY)}, ends="refused").tally == {("good", "dead letter"): 1}
    assert books(letters={"m-1.json": letter("x")}).tally == {("good", "missing"): 1}


def test_a_dead_letter_may_have_what_the_message_pointed_at():
    pointed = samples.OBJECTS[f"{samples.FILES}pointed.json"].decode()
    assert books(letters={"m-1.json": letter(pointed)}).mistakes == []


def test_an_event_about_nothing_leaves_nothing():
    assert books(body='{"Event": "s3:TestEvent"}').tally == {("good", "no job"): 1}


def test_an_event_s_job_goes_by_the_id_that_it_is_given():
    event = (
        '{"Records":[{"eventName":"ObjectCreated:Put","s3":{"bucket":{"name":"b"},"object":{"key":"k"}}}]}'
    )
    job_id = "s3-" + hashlib.sha256(b"b/k ").hexdigest()[:40]
    assert books({f"{job_id}/manifest.json": manifest("failed", job_id)}, body=event).mistakes == []


def test_a_part_without_the_others_is_told_apart():
    assert books({"a/results-00000-of-00002.jsonl": LINES}).tally == {("good", "part"): 1}


@pytest.mark.parametrize(
    ("results", "letters", "ends"),
    [
        ({}, {}, ""),
        (DONE, {}, "refused"),
        ({"a/manifest.json": manifest("failed")}, {}, "completed"),
        (DONE | {"a/r.jsonl": LINES + LINES}, {}, ""),
        ({"a/manifest.json": manifest()}, {}, ""),
        (
            DONE | {"a/manifest.json": manifest(request_counts={"total": 3, "completed": 3, "failed": 0})},
            {},
            "",
        ),
        (DONE | {"a/manifest.json": manifest(job_id="b")}, {}, ""),
        ({"a/manifest.json": manifest("failed", error={"code": "gave_up", "message": "why"})}, {}, ""),
        (DONE | {"b/manifest.json": manifest("failed", "b")}, {}, ""),
        (DONE, {"m-2.json": letter("x")}, ""),
    ],
    ids=[
        "lost",
        "served",
        "not-served",
        "other-bytes",
        "no-bytes",
        "count",
        "other-job",
        "gave-up",
        "of-nobody",
        "letter",
    ],
)
def test_what_is_amiss_is_told(results, letters, ends):
    assert books(results, letters, ends=ends).mistakes
