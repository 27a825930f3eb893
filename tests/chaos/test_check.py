"""The judge itself: whatever is wrong with results, it says so."""

import hashlib
import json
import random

import pytest

from tests.chaos.check import check
from tests.chaos.workload import UNKNOWN, Answers, Ask, Job, make_jobs, make_large_jobs

ASKS = (Ask("", "a", 1), Ask("red", "a", 2), Ask(UNKNOWN, "b", 1), Ask("red", "b", 1))
JOB = Job("j", ASKS)
ANSWERS = Answers({ask: f"{ask.adapter} says {ask.prompt}" for ask in ASKS}, {"red": "v1"})


def lines_of(job=JOB):
    """What a good worker writes."""
    lines = []
    for index, ask in enumerate(job.asks):
        failed = ask.adapter == UNKNOWN
        lines.append(
            {
                "id": job.row_id(index),
                "index": index,
                "adapter": ask.adapter,
                "adapter_version": None if failed else ANSWERS.versions.get(ask.adapter),
                "generated_text": None if failed else ANSWERS.texts[ask],
                "error": {"code": "adapter_not_found"} if failed else None,
            }
        )
    return lines


def world(*files, **changes):
    """The objects of one job whose lines lie in these files."""
    objects, outputs = {}, []
    for number, lines in enumerate(files):
        body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        key = f"out/j/results-{number:05d}-of-{len(files):05d}.jsonl"
        digests = {"sha256": hashlib.sha256(body).hexdigest(), "etag": hashlib.md5(body).hexdigest()}
        outputs.append({"uri": f"s3://b/{key}", "rows": len(lines), **digests})
        objects[key] = body
    counts = {"total": 4, "completed": 3, "failed": 1}
    manifest = {
        "job_id": "j",
        "status": "completed_with_errors",
        "request_counts": counts,
        "outputs": outputs,
    }
    objects["out/j/manifest.json"] = json.dumps({**manifest, "error": None, **changes}).encode()
    return objects


def judge(objects, jobs=(JOB,)):
    def read(key):
        return (objects[key], hashlib.md5(objects[key]).hexdigest()) if key in objects else None

    return check(jobs, ANSWERS, read, objects, "out/")


def test_good_results_are_good():
    found = judge(world(lines_of()))
    assert found.is_good, found.problems
    assert (found.jobs, found.manifests, found.rows, found.once, found.result_files) == (1, 1, 4, 4, 1)


def test_rows_in_several_files_are_read_in_their_order():
    lines = lines_of()
    assert judge(world(lines[:3], lines[3:])).is_good
    found = judge(world(lines[3:], lines[:3]))
    assert (found.is_good, found.once, found.wrong) == (False, 4, 4)


def test_job_without_manifest_has_lost_its_rows():
    objects = world(lines_of())
    del objects["out/j/manifest.json"]
    found = judge(objects)
    assert (found.is_good, found.manifests, found.lost, found.once) == (False, 0, 4, 0)


def test_row_that_is_missing_is_lost():
    found = judge(world(lines_of()[:-1]))
    assert (found.is_good, found.lost, found.once, found.wrong) == (False, 1, 3, 0)


def test_row_that_is_there_again_is_there_twice():
    lines = lines_of()
    found = judge(world([*lines, lines[1]]))
    assert (found.is_good, found.twice, found.once) == (False, 1, 3)
    found = judge(world(lines, lines[:1]))
    assert (found.is_good, found.twice, found.once) == (False, 1, 3)


def test_row_that_nobody_asked_for_is_strange():
    found = judge(world([*lines_of(), {**lines_of()[0], "id": "other"}]))
    assert (found.is_good, found.strange) == (False, 1)


@pytest.mark.parametrize(
    ("row", "change"),
    [
        (0, {"generated_text": "something else"}),
        (0, {"index": 1}),
        (0, {"adapter": "red"}),
        (1, {"adapter_version": "v2"}),
        (1, {"adapter_version": None}),
        (1, {"error": {"code": "internal"}, "generated_text": None}),
        (2, {"error": {"code": "internal"}}),
        (2, {"error": None, "generated_text": "the base model's"}),
    ],
)
def test_row_that_says_something_else_is_wrong(row, change):
    lines = lines_of()
    lines[row] |= change
    found = judge(world(lines))
    assert (found.is_good, found.once, found.wrong) == (False, 4, 1)


def test_rows_out_of_order_are_wrong():
    lines = lines_of()
    found = judge(world([lines[1], lines[0], *lines[2:]]))
    assert (found.is_good, found.wrong) == (False, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"status": "failed", "error": {"code": "gave_up"}},
        {"status": "completed"},
        {"job_id": "other"},
        {"request_counts": {"total": 4, "completed": 4, "failed": 0}},
    ],
)
def test_manifest_that_says_something_else_is_not_completed(change):
    found = judge(world(lines_of(), **change))
    assert (found.is_good, found.manifests) == (False, 0)


def test_file_that_is_not_the_committed_one_is_noticed():
    objects = world(lines_of())
    key = "out/j/results-00000-of-00001.jsonl"
    objects[key] = objects[key].replace(b'"error": null', b'"error":  null', 1)
    found = judge(objects)
    assert (found.is_good, found.once) == (False, 4)
    del objects[key]
    assert not judge(objects).is_good


def test_results_that_no_manifest_names_are_noticed():
    objects = world(lines_of())
    objects["out/j/results-00001-of-00002.jsonl"] = b""
    assert not judge(objects).is_good


def test_jobs_are_the_same_for_the_same_seed_and_have_every_kind_of_row():
    jobs, again = (make_jobs(random.Random(1), 200, ["red", "blue"]) for _ in range(2))
    assert jobs == again
    assert {len(job.asks) for job in jobs} >= {1, 50}
    assert {ask.adapter for job in jobs for ask in job.asks} == {"", "red", "blue", UNKNOWN}
    assert len({job.id for job in jobs}) == 200


def test_large_job_is_a_file_of_rows_and_a_message_that_names_it():
    (job,) = make_large_jobs(random.Random(1), 1, ["red"], 300)
    lines = [json.loads(line) for line in job.lines.splitlines()]
    assert lines == job.rows
    assert json.loads(job.message("s3://b/in.jsonl")) == {
        "id": "large-00000",
        "input": {"uri": "s3://b/in.jsonl"},
    }
    assert json.loads(job._replace(by_reference=False).message())["inputs"] == job.rows
