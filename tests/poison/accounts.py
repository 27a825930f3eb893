"""What became of each message, by what is in the bucket: nothing here asks the worker.

Of the worker's code this takes what unwraps an event, to know by which ids its jobs go.
"""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from tests.e2e.conftest import PREFIX
from tests.poison import samples
from tests.poison.messages import Message
from worker import wire
from worker.errors import JobError
from worker.jobs import Delivery

SERVED = ("completed", "completed_with_errors", "expired", "cancelled")
REFUSED = ("failed", "dead letter")
PART, NO_JOB, LOST = "part", "no job", "missing"
"""A part of a job whose other parts nobody sent; an event about nothing that is a job; no trace at all."""


class Bucket(NamedTuple):
    """All that a run has left: bodies by key, below the prefixes of results and of dead letters."""

    results: Mapping[str, bytes]
    letters: Mapping[str, bytes]


class Accounts(NamedTuple):
    tally: Counter[tuple[str, str]]
    """Messages by kind and end."""
    rows: Counter[str]
    """Rows by error code; "" are those without."""
    mistakes: list[str]
    """Whatever is not as promised."""


def account(sent: Mapping[str, Message], bucket: Bucket) -> Accounts:
    """See where each message has ended; `sent` goes by message id."""
    folders = {key.rpartition("/")[0] for key in bucket.results}
    # An output may lie anywhere below the worker's prefix; the last folder is the job's id.
    jobs = {folder.rpartition("/")[2]: folder for folder in folders}
    manifests = {job: _json(bucket.results.get(f"{folder}/manifest.json")) for job, folder in jobs.items()}
    letters = {key.removesuffix(".json"): _json(body) for key, body in bucket.letters.items()}
    tally: Counter[tuple[str, str]] = Counter()
    rows: Counter[str] = Counter()
    mistakes, claimed = [], set()
    for message_id, message in sent.items():
        ids = [job for job in ids_of(message_id, message) if job in jobs]
        claimed |= set(ids)
        end = _end(message_id, message, [manifests[job] for job in ids], letters)
        tally[message.kind, end] += 1
        if not _as_promised(message.ends, end):
            mistakes.append(f"{message_id}, {message.kind}: {end}: {message.body[:300]!r}")
    mistakes += [f"a dead letter of nobody: {one}" for one in letters.keys() - sent.keys()]
    mistakes += [f"results of nobody: {one}" for one in jobs.keys() - claimed]
    for job, manifest in manifests.items():
        if manifest is not None:
            mistakes += _wrong_in(jobs[job], manifest, bucket.results, rows)
    return Accounts(tally, rows, mistakes)


def ids_of(message_id: str, message: Message) -> list[str]:
    """What the jobs of a message may be called."""
    texts = {name: one["StringValue"] for name, one in message.attributes.items() if "StringValue" in one}
    outer = Delivery(message_id=message_id, body=message.body, receipt="", attributes=texts)
    with contextlib.suppress(JobError, RecursionError):
        pointer = wire.find_pointer(outer)
        key = "" if pointer is None else pointer.uri.removeprefix(f"s3://{samples.BUCKET}/")
        if key in samples.OBJECTS:
            outer = wire.with_body(outer, samples.OBJECTS[key].decode(errors="replace"))
        return [message_id, *filter(None, (_said(one.body) for one in wire.unwrap(outer)))]
    return [message_id, _said(message.body) or message_id]


def is_no_job(message: Message) -> bool:
    """Whether a message is an event, and about nothing that is a job."""
    delivery = Delivery(message_id="m", body=message.body, receipt="")
    with contextlib.suppress(JobError, RecursionError):
        return wire.unwrap(delivery, (PREFIX,)) == []
    return False


def _said(body: str) -> str | None:
    with contextlib.suppress(msgspec.DecodeError, UnicodeError, RecursionError):
        value = msgspec.json.decode(body)
        if isinstance(value, dict) and isinstance(value.get("id"), str):
            return value["id"]
    return None


def _end(message_id: str, message: Message, manifests: Sequence[Any], letters: Mapping[str, Any]) -> str:
    letter = letters.get(message_id)
    if letter is not None:
        return "dead letter" if _is_copy(letter, message) else LOST
    if not manifests:
        return NO_JOB if is_no_job(message) else LOST
    return PART if manifests[0] is None else str(manifests[0]["status"])


def _is_copy(letter: Mapping[str, Any], message: Message) -> bool:
    """Whether a dead letter has all of the message; of one that only pointed, it has what it pointed at."""
    return letter["body"] == message.body or letter["body"].encode() in samples.OBJECTS.values()


def _as_promised(promise: str, end: str) -> bool:
    match promise:
        case "completed":
            return end == "completed"
        case "served":
            return end in SERVED
        case "refused":
            return end in REFUSED
    return end != LOST


def _wrong_in(
    folder: str, manifest: Mapping[str, Any], results: Mapping[str, bytes], rows: Counter[str]
) -> Iterator[str]:
    """What of one job's manifest its results do not bear out."""
    if manifest["job_id"] != folder.rpartition("/")[2]:
        yield f"{folder}: the manifest is that of {manifest['job_id']}"
    if manifest["error"] is not None and manifest["error"]["code"] == "gave_up":
        yield f"{folder}: given up: {manifest['error']['message']}"
    if manifest["status"] == "failed":
        return
    lines = []
    for output in manifest["outputs"]:
        key = f"{folder}/{output['uri'].rpartition('/')[2]}"
        body = results.get(key, b"")
        if hashlib.sha256(body).hexdigest() != output["sha256"]:
            yield f"{folder}: {key} is not what the manifest says"
        lines += [json.loads(line) for line in body.splitlines()]
    counts = manifest["request_counts"]
    if len(lines) != counts["total"] or counts["completed"] + counts["failed"] != counts["total"]:
        yield f"{folder}: {len(lines)} lines, and {counts}"
    if [line["index"] for line in lines if "index" in line] not in ([], [*range(len(lines))]):
        yield f"{folder}: the rows are not in order, each once"
    rows[""] += counts["completed"]
    rows.update(manifest["error_counts"])


def _json(body: bytes | None) -> Any:
    return None if body is None else json.loads(body)
