import json

import msgspec
import pytest

from worker.errors import LoramillError
from worker.jobs import Failure, Job, Output, Row, SamplingParams
from worker.wire.manifest import (
    OutputFile,
    RequestCounts,
    Status,
    decode_manifest,
    encode_manifest,
    failed,
    parameters_digest,
    status_of,
    summarize,
)
from worker.wire.results import Tally, Usage
from worker.wire.split import InputFile

JOB = Job(
    id="j",
    rows=(Row(index=0, id="0", text="x"), Row(index=1, id="1", text="y")),
    output=Output(uri="s3://b/x/"),
    digest="d",
    created_at=1.0,
    metadata={"who": "me"},
)
FILE = OutputFile("s3://b/x/j/results-00000-of-00001.jsonl", '"e"', "5ha", 2)


def whole(*tallies, **more):
    return summarize(
        JOB,
        [(FILE, tally) for tally in tallies],
        base_model="m",
        worker="w",
        started_at=2.0,
        finished_at=3.0,
        software_version="0.1.0",
        **more,
    )


@pytest.mark.parametrize(
    ("errors", "error", "status"),
    [
        ({"cancelled": 1, "expired": 1, "oom": 1}, Failure("x", "y"), Status.FAILED),
        ({"cancelled": 1, "expired": 1, "oom": 1}, None, Status.CANCELLED),
        ({"expired": 1, "oom": 1}, None, Status.EXPIRED),
        ({"oom": 1}, None, Status.COMPLETED_WITH_ERRORS),
        ({}, None, Status.COMPLETED),
    ],
)
def test_status_follows_from_the_rows_line_by_line_of_the_table(errors, error, status):
    rows = 1 + sum(errors.values())
    assert status_of(Tally(rows=rows, completed=1, errors=errors), error) is status


def test_a_manifest_says_all_that_the_spec_names():
    tally = Tally(
        rows=2,
        completed=1,
        errors={"oom": 1},
        usage=Usage(5, 6),
        adapters={"fr": ("v1", "v2"), "de": ("v3",)},
    )
    manifest = whole(tally, input_file=InputFile("s3://b/in.jsonl", '"i"'))
    said = json.loads(encode_manifest(manifest))
    assert said == {
        "job_id": "j",
        "status": "completed_with_errors",
        "request_counts": {"total": 2, "completed": 1, "failed": 1},
        "error_counts": {"oom": 1},
        "usage": {"prompt_tokens": 5, "completion_tokens": 6},
        "input": {"uri": "s3://b/in.jsonl", "etag": '"i"'},
        "outputs": [{"uri": FILE.uri, "etag": '"e"', "sha256": "5ha", "rows": 2}],
        "adapters": {"de": "v3", "fr": "v1,v2"},
        "base_model": "m",
        "digest": "d",
        "parameters_digest": parameters_digest(JOB),
        "worker": "w",
        "created_at": 1.0,
        "started_at": 2.0,
        "finished_at": 3.0,
        "software_version": "0.1.0",
        "metadata": {"who": "me"},
        "error": None,
    }


def test_parts_add_up():
    one = Tally(rows=2, completed=2, usage=Usage(1, 2))
    manifest = whole(one, one)
    assert manifest.request_counts == RequestCounts(4, 4, 0)
    assert manifest.usage == Usage(2, 4)
    assert len(manifest.outputs) == 2


def test_a_failed_job_with_and_without_its_rows():
    about = {"worker": "w", "created_at": 1.0, "finished_at": 3.0, "software_version": "0.1.0"}
    unread = failed("j", Failure("invalid_message", "why"), **about)
    assert (unread.status, unread.request_counts, unread.digest) == (Status.FAILED, RequestCounts(), None)
    known = failed("j", Failure("internal", "why"), job=JOB, **about)
    assert (known.request_counts, known.digest) == (RequestCounts(2, 0, 2), "d")
    for manifest in (unread, known):
        assert decode_manifest(encode_manifest(manifest)) == manifest


def test_what_is_written_reads_back_and_later_fields_are_passed_over():
    manifest = whole(Tally(rows=2, completed=2))
    data = encode_manifest(manifest)
    assert data.endswith(b"}\n")
    assert decode_manifest(data) == manifest
    assert decode_manifest(data.replace(b"{", b'{"later": 1,', 1)) == manifest


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b'{"job_id":1}', b"[" * 100_000])
def test_what_is_no_manifest_is_an_error(data):
    with pytest.raises(LoramillError, match="not a manifest"):
        decode_manifest(data)


def test_the_parameters_digest_is_of_parameters_alone():
    rows = tuple(msgspec.structs.replace(row, text="z", id=row.id + "a") for row in JOB.rows)
    assert parameters_digest(msgspec.structs.replace(JOB, rows=rows)) == parameters_digest(JOB)
    rows = (msgspec.structs.replace(rows[0], params=SamplingParams(seed=1)), rows[1])
    assert parameters_digest(msgspec.structs.replace(JOB, rows=rows)) != parameters_digest(JOB)
