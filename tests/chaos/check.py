"""Whether every row of every job stands in the committed results once, in its place, and is right."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from tests.chaos.workload import Answers, Ask, Job

_MOST_PROBLEMS = 20

Read = Callable[[str], tuple[bytes, str] | None]
"""The object with this key and its ETag; None when there is none."""


class Found(msgspec.Struct, kw_only=True):
    """What the results say, counted."""

    jobs: int = 0
    manifests: int = 0
    """Jobs whose manifest says that they are completed, errors of rows or not."""
    result_files: int = 0
    rows: int = 0
    once: int = 0
    lost: int = 0
    twice: int = 0
    wrong: int = 0
    """Rows that stand there once, and are in the wrong place or say something else than they must."""
    strange: int = 0
    """Lines for rows that nobody asked for."""
    problems: list[str] = []
    """The first of them, in words."""

    @property
    def is_good(self) -> bool:
        return self.once == self.rows and self.manifests == self.jobs and not (self.wrong or self.problems)

    def complain(self, text: str) -> None:
        if len(self.problems) < _MOST_PROBLEMS:
            self.problems.append(text)


def check(jobs: Iterable[Job], answers: Answers, read: Read, keys: Iterable[str], prefix: str) -> Found:
    """Look at the results of `jobs`, which lie below `prefix` of one bucket, where there are these `keys`."""
    found = Found()
    named = set[str]()
    for job in jobs:
        named |= _check_job(job, answers, read, prefix, found)
    present = {key for key in keys if key.rpartition("/")[2].startswith("results-")}
    for key in sorted(present - named):
        found.complain(f"{key} is not named by a manifest")
    return found


def _check_job(job: Job, answers: Answers, read: Read, prefix: str, found: Found) -> set[str]:
    """Count one job; returns the keys of its result files."""
    found.jobs += 1
    found.rows += len(job.asks)
    stored = read(f"{prefix}{job.id}/manifest.json")
    if stored is None:
        found.lost += len(job.asks)
        found.complain(f"{job.id} has no manifest")
        return set()
    manifest = json.loads(stored[0])
    failing = sum(answers.error(ask) is not None for ask in job.asks)
    status = "completed_with_errors" if failing else "completed"
    counts = {"total": len(job.asks), "completed": len(job.asks) - failing, "failed": failing}
    if (manifest["job_id"], manifest["status"], manifest["request_counts"]) == (job.id, status, counts):
        found.manifests += 1
    else:
        found.complain(f"{job.id}: {manifest['status']}, {manifest['request_counts']}, {manifest['error']}")
    lines, keys = list[dict[str, Any]](), set[str]()
    for output in manifest["outputs"]:
        key = output["uri"].removeprefix("s3://").partition("/")[2]
        keys.add(key)
        lines += _lines(output, read(key), found)
    _check_lines(job, answers, lines, found)
    return keys


def _lines(output: dict[str, Any], stored: tuple[bytes, str] | None, found: Found) -> list[dict[str, Any]]:
    """The lines of a file, which must be the one that the manifest names."""
    found.result_files += 1
    if stored is None:
        found.complain(f"{output['uri']} is not there")
        return []
    body, etag = stored
    lines = [json.loads(line) for line in body.splitlines()]
    described = (hashlib.sha256(body).hexdigest(), etag, len(lines))
    if described != (output["sha256"], output["etag"], output["rows"]):
        found.complain(f"{output['uri']} is not what the manifest says")
    return lines


def _check_lines(job: Job, answers: Answers, lines: list[dict[str, Any]], found: Found) -> None:
    times = Counter(line["id"] for line in lines)
    for index, ask in enumerate(job.asks):
        row_id = job.row_id(index)
        count = times.pop(row_id, 0)
        if count == 1:
            found.once += 1
            if index >= len(lines) or not _is_right(lines[index], index, row_id, ask, answers):
                found.wrong += 1
                found.complain(f"{row_id} is wrong: {lines[index] if index < len(lines) else 'misplaced'}")
        elif count:
            found.twice += 1
            found.complain(f"{row_id} is there {count} times")
        else:
            found.lost += 1
            found.complain(f"{row_id} is lost")
    found.strange += times.total()
    for row_id in times:
        found.complain(f"{job.id}: nobody asked for {row_id}")


def _is_right(line: dict[str, Any], index: int, row_id: str, ask: Ask, answers: Answers) -> bool:
    place = (line["index"], line["id"], line["adapter"])
    error = line["error"] and line["error"]["code"]
    must = answers.error(ask)
    said = (line["generated_text"], line["adapter_version"])
    wanted = (None, None) if must else (answers.texts[ask], answers.versions.get(ask.adapter))
    return place == (index, row_id, ask.adapter) and error == must and said == wanted
