"""Jobs that are good, in every format that a message may have, and messages that only look like jobs.

All of them are small: a row takes a few tokens.
"""

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from typing import Any

from tests.e2e.conftest import BUCKET, PREFIX
from tests.sync import events

ADAPTERS = ("red", "green")
NAMES = ("", *ADAPTERS)
FILES = "in/"
"""Where the objects lie that messages refer to."""

Body = dict[str, Any]


def native(rng: random.Random, job_id: str) -> Body:
    """Rows of every kind, with the fields that a job may have."""
    rows: list[Any] = [
        "a text",
        {"id": "messages", "messages": [{"role": "user", "content": "hi"}], "adapter": rng.choice(NAMES)},
        {"id": "tokens", "input": [1, 2, 3], "parameters": {"details": True, "top_n_tokens": 2}},
        {
            "id": "sampled",
            "input": "b",
            "parameters": {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 7},
        },
        {"id": "changed", "input": "c", "parameters": {"logit_bias": {"65": 2.5}, "stop_sequences": ["x"]}},
    ]
    job: Body = {"id": job_id, "inputs": rng.sample(rows, rng.randint(1, len(rows)))}
    count = len(job["inputs"])
    fields: Body = {
        "version": 1,
        "adapters": rng.choice([rng.choice(NAMES), [rng.choice(NAMES) for _ in range(count)]]),
        "task": "generate",
        "output": {"uri": PREFIX, "format": rng.choice(("native", "openai", "bedrock"))},
        "ttl_seconds": 3600,
        "metadata": {"team": "poison"},
    }
    job |= {name: fields[name] for name in rng.sample(list(fields), rng.randint(0, len(fields)))}
    return job | {"parameters": {"max_new_tokens": 3}}


def openai(rng: random.Random, job_id: str) -> Body:
    """Requests of OpenAI's batch files."""
    chat = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "logprobs": True}
    bodies: list[tuple[str, Body]] = [
        (
            "chat/completions",
            chat | {"max_tokens": 3, "top_logprobs": 2, "response_format": {"type": "text"}},
        ),
        ("completions", {"prompt": "a", "max_tokens": 3, "echo": True, "logprobs": 0, "stop": ["x"]}),
        ("completions", {"prompt": [1, 2], "max_tokens": 2, "temperature": 0, "n": 1, "user": "me"}),
    ]
    rows = [
        {"custom_id": f"r{n}", "method": "POST", "url": f"/v1/{url}", "body": {"model": _model(rng)} | body}
        for n, (url, body) in enumerate(rng.sample(bodies, rng.randint(1, len(bodies))))
    ]
    return {"id": job_id, "inputs": rows, "output": {"uri": PREFIX, "format": "openai"}}


def bedrock(rng: random.Random, job_id: str) -> Body:
    """Records of Bedrock's batch files."""
    inputs: list[Body] = [
        {"prompt": "a", "max_gen_len": 3, "temperature": 0, "adapter": rng.choice(NAMES)},
        {"prompt": "b", "max_tokens": 3, "stop": ["x"], "top_k": 4},
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
    ]
    rows = [
        {"recordId": f"CALL{n:07}", "modelInput": one}
        for n, one in enumerate(rng.sample(inputs, rng.randint(1, len(inputs))))
    ]
    return {"id": job_id, "inputs": rows, "output": {"uri": PREFIX, "format": "bedrock"}}


def score(rng: random.Random, job_id: str) -> Body:
    """Rows that are scored."""
    rows = [
        {"input": "Bees make", "target": " honey", "adapter": rng.choice(NAMES)},
        {"input": [1, 2], "target": [3]},
        {"input": "", "target": "x"},
        "a text by itself",
    ]
    return {"id": job_id, "task": "score", "inputs": rows, "parameters": {"details": rng.random() < 0.5}}


JOBS: tuple[Callable[[random.Random, str], Body], ...] = (native, openai, bedrock, score)

POINTED: Body = {"inputs": "pointed at", "parameters": {"max_new_tokens": 2}}
OBJECTS: Mapping[str, bytes] = {
    f"{FILES}rows.jsonl": b'"a"\n{"input": "b", "adapter": "red"}\nno json\n\n{"id": "last", "input": [1]}',
    f"{FILES}empty.jsonl": b"",
    f"{FILES}binary.jsonl": bytes(range(256)) * 4,
    f"{FILES}not-packed.jsonl.gz": b'{"input": "a"}\n',
    f"{FILES}folder/": b"",
    f"{FILES}pointed.json": json.dumps(POINTED).encode(),
}
"""Objects in the bucket, by key, not all of which can be read."""
BUCKETS = (
    *[BUCKET] * 9, "no-such-bucket", "arn:aws:s3:us-east-1:123456789012:accesspoint:x", "Bad_Bucket!", "..",
    "a", "mill:80", "me@mill", "mill?x=", "%2e", "🜚", "x" * 300,
)  # fmt: skip
"""Where messages say that objects lie; most of them no bucket."""
_MISSING = (f"{FILES}nothing-here.jsonl", f"{FILES}é %2F+.jsonl", "x" * 900)


def by_reference(rng: random.Random, job_id: str) -> Body:
    """A job, or a part of one, whose rows are said to be in an object."""
    key = _key(rng)
    body = OBJECTS.get(key, b"")
    source: Body = {"uri": f"s3://{rng.choice(BUCKETS)}/{key}"}
    fields: Body = {
        "etag": rng.choice((hashlib.md5(body, usedforsecurity=False).hexdigest(), "0" * 32)),
        "format": rng.choice(("auto", "native", "openai", "bedrock")),
        "range": rng.choice(([0, 9], [3, 2], [5, 10**12], [0, len(body)])),
    }
    source |= {name: fields[name] for name in fields if rng.random() < 0.4}
    job: Body = {"id": job_id, "input": source, "parameters": {"max_new_tokens": 2}}
    if rng.random() < 0.3:
        source |= {"first_row": rng.choice((0, 7, 2**61)), "rows": rng.choice((1, 2, 4, 10**9))} | fields
        number = rng.choice((0, 1, 98_000))
        job |= {"part": number, "parts": number + rng.choice((1, 2)), "digest": "d" * 64, "created_at": 1.5}
    return job


def event(rng: random.Random, job_id: str) -> Body:
    """What S3, SNS or EventBridge say of an object; or an SNS notification of a job."""
    key, removed = _key(rng), rng.random() < 0.2
    body = rng.choice((events.from_s3, events.by_eventbridge))(rng.choice(BUCKETS), key, removed=removed)
    if rng.random() < 0.1 and "Records" in body:
        body = json.dumps({"Records": json.loads(body)["Records"] * 3})
    plain: Body = {"id": job_id, "inputs": "by SNS", "parameters": {"max_new_tokens": 2}}
    test = {
        "Service": "Amazon S3",
        "Event": "s3:TestEvent",
        "Bucket": BUCKET,
        "RequestId": "5582815E1AEA5ADF",
    }
    wrapped = events.by_sns(rng.choice((body, json.dumps(plain), json.dumps(test))))
    found: Body = json.loads(rng.choice((body, body, wrapped, json.dumps(test))))
    return found


def pointer(rng: random.Random) -> list[Any]:
    """What the extended client sends in place of a large body."""
    where = {"s3BucketName": rng.choice(BUCKETS), "s3Key": _key(rng, *[f"{FILES}pointed.json"] * 9)}
    return ["software.amazon.payloadoffloading.PayloadS3Pointer", where]


def _model(rng: random.Random) -> str:
    return rng.choice(("tiny", *ADAPTERS))


def _key(rng: random.Random, *more: str) -> str:
    return rng.choice((*OBJECTS, *_MISSING, *more))
