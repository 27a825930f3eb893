"""Good messages with mistakes in them: each is read, or refused with words that can be written down."""

import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.poison import samples
from tests.poison.messages import messages
from tests.poison.mutations import garbled, mutated
from worker import wire
from worker.errors import JobError
from worker.jobs import Delivery, FinishReason, RowResult
from worker.wire.checks import failure_of
from worker.wire.manifest import OutputFile, failed, summarize
from worker.wire.split import InputFile, Slice

fuzzed = settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
ABOUT = {"worker": "w", "finished_at": 2.0, "software_version": "v"}
PREFIXES = ("s3://mill/out/",)
RANDOM = st.randoms(use_true_random=False)


def delivery(body, attributes=None):
    return Delivery(message_id="m-1", body=body, receipt="r", sent_at=1.0, attributes=attributes or {})


def decode(one):
    return wire.decode(one, output_prefixes=PREFIXES, max_rows=50, now=1.0, base_models={"tiny"})


def check(one):
    """Do with a message what a worker does, without a model and without AWS."""
    try:
        if wire.find_pointer(one) is not None:
            one = wire.with_body(one, json.dumps(samples.POINTED))
        for inner in wire.unwrap(one, PREFIXES):
            check_job(inner, decode(inner))
    except JobError as error:
        check_refused(one, error)


def check_job(one, job):
    assert wire.salvage(one, PREFIXES) == (job.id, job.output)
    assert job == decode(one)
    assert (job.source is None) == bool(job.rows)
    if job.source is not None:
        job = wire.located(job, "e")
    results = [result_of(row) for row in job.rows]
    body = wire.encode_rows(job, results, base_model="tiny")
    assert body.count(b"\n") == len(results)
    tally = wire.tally(body, job.output.format)
    assert (tally.rows, tally.failed) == (len(job.rows), sum(row.failure is not None for row in job.rows))
    file = OutputFile(wire.result_uri(job), "etag", tally.sha256, tally.rows)
    manifest = summarize(job, [(file, tally)], base_model="tiny", started_at=None, **ABOUT)
    assert wire.decode_manifest(wire.encode_manifest(manifest)) == manifest


def result_of(row):
    return RowResult(
        row=row, text="x", finish_reason=FinishReason.LENGTH, prompt_tokens=1, failure=row.failure
    )


def check_refused(one, error):
    failure = failure_of(error)
    assert 0 < len(failure.message) <= 1000
    job_id, output = wire.salvage(one, PREFIXES)
    assert wire.native.is_job_id(job_id)
    assert output is None or output.uri.startswith(PREFIXES)
    manifest = failed(job_id, failure, created_at=1.0, **ABOUT)
    assert wire.decode_manifest(wire.encode_manifest(manifest)) == manifest
    letter = json.loads(wire.encode_dead_letter(one, failure, now=2.0))
    assert (letter["body"], letter["attributes"]) == (one.body, one.attributes)


@pytest.mark.parametrize("make", samples.JOBS)
@pytest.mark.parametrize("seed", range(8))
def test_the_samples_are_good_jobs(make, seed):
    one = delivery(json.dumps(make(random.Random(seed), "p-1")))
    assert [row.failure for row in decode(one).rows] == [None] * len(decode(one).rows)
    check(one)


@pytest.mark.parametrize("make", [*samples.JOBS, samples.by_reference])
@fuzzed
@given(rng=RANDOM, times=st.integers(1, 4))
def test_a_job_with_mistakes_is_read_or_refused(make, rng, times):
    check(delivery(mutated(make(rng, "p-1"), rng, times)))


@fuzzed
@given(rng=RANDOM, times=st.integers(0, 3))
def test_an_envelope_with_mistakes_is_opened_or_refused(rng, times):
    check(delivery(mutated(samples.event(rng, "p-1"), rng, times)))
    size = {rng.choice(("ExtendedPayloadSize", "SQSLargePayloadSize")): "1"}
    check(delivery(mutated(samples.pointer(rng), rng, times), size))


@fuzzed
@given(rng=RANDOM)
def test_a_job_that_was_garbled_on_its_way_is_read_or_refused(rng):
    text = json.dumps(rng.choice(samples.JOBS)(rng, "p-1"), ensure_ascii=False)
    for _ in range(3):
        text = garbled(text, rng)
        check(delivery(text))


@fuzzed
@given(
    rng=RANDOM,
    attributes=st.dictionaries(
        st.sampled_from(["adapter", "ADAPTER", "X-Amzn-SageMaker-Adapter-Identifier", "ExtendedPayloadSize"])
        | st.text(max_size=5),
        st.text(max_size=200) | st.sampled_from(["red", "", "a/b", "\ud800", "x" * 5_000]),
        max_size=4,
    ),
)
def test_any_attributes_of_a_job_are_read_or_refused(rng, attributes):
    check(delivery(json.dumps(rng.choice(samples.JOBS)(rng, "p-1")), attributes))


@fuzzed
@given(rng=RANDOM, override=st.sampled_from([None, "red", "a/b"]), ttl=st.sampled_from([None, 60, 0.25]))
def test_a_part_s_message_says_what_its_job_s_did(rng, override, ttl):
    body = {
        "id": "p-1",
        "input": {"uri": f"s3://in/{rng.random()} ü.jsonl", "format": rng.choice(["auto", "openai"])},
        "adapters": rng.choice(samples.NAMES),
        "metadata": {"a": "é"},
        "ttl_seconds": ttl,
        "parameters": {"seed": rng.randrange(2**64)},
    }
    attributes = {} if override is None else {"adapter": override}
    job = wire.located(decode(delivery(json.dumps(body), attributes)), "0" * 32)
    slices = (Slice(0, 9, 0, 2), Slice(9, 20, 2, 1))
    split = wire.Split(
        job_id=job.id, digest=job.digest, input=InputFile("u", "e"), rows=3, parts=slices, created_at=1.0
    )
    for number in range(2):
        part = wire.part_of(job, split, number)
        assert decode(delivery(wire.encode_part(part), attributes)) == part


def test_every_message_of_the_poison_is_read_or_refused():
    for message in messages(400, seed=3):
        attributes = {n: one["StringValue"] for n, one in message.attributes.items() if "StringValue" in one}
        check(delivery(message.body, attributes))
