"""One run: a server, a proxy that makes faults, workers that are struck, and the tally in the end."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tests import tiny
from tests.chaos.check import Found, check
from tests.chaos.expected import expected_texts
from tests.chaos.fleet import Fleet
from tests.chaos.rampage import Rampage
from tests.chaos.tally import Tally
from tests.chaos.workload import Answers, Job, make_jobs, make_large_jobs
from tests.e2e.conftest import BUCKET, Mill, Queue
from tests.faults.plans import Chance, Plan
from tests.faults.proxy import Proxy
from tests.sync import servers

VISIBILITY_SECONDS = 10
"""The least that a worker takes."""
_DRAIN_SECONDS = 10
_STOP_SECONDS = 60
_MAX_RECEIVES = 100
_SENT_TWICE = 0.03
_LOOK_SECONDS = 2.0
_TICK_SECONDS = 0.5
_SAY_SECONDS = 20.0
_OUT, _IN = "out/", "in/"
_COMMITS = ("results-", "manifest.json")
"""Objects that are written once: what their names begin with."""
_ADAPTERS: dict[str, dict[str, Any]] = {
    "red": {"r": 4, "target_modules": tiny.ATTENTION},
    "green": {"r": 8, "lora_alpha": 4, "target_modules": tiny.MLP, "use_rslora": True},
    "blue": {"r": 2, "lora_alpha": 16, "target_modules": "all-linear"},
}


class Options(NamedTuple):
    """What a run is made of."""

    jobs: int = 2000
    workers: int = 3
    kills: int = 50
    faults: float = 0.05
    """The share of calls that meet one."""
    seed: int = 0
    max_rows: int = 50
    large: int = 0
    """Jobs whose rows lie in an object."""
    large_rows: int = 400
    rows_per_part: int = 50
    deadline_seconds: float = 3600.0


def run(options: Options, folder: Path, say: Callable[[str], None] = lambda _: None) -> Tally:
    """Run in an empty `folder`; `say` is told now and then how it goes."""
    rng = random.Random(options.seed)
    with servers.moto_apart() as server:
        mill = Mill(server, folder)
        answers = _publish(mill)
        jobs = make_jobs(rng, options.jobs, list(_ADAPTERS), max_rows=options.max_rows)
        jobs += make_large_jobs(rng, options.large, list(_ADAPTERS), options.large_rows)
        rng.shuffle(jobs)
        queue = mill.queue(max_receives=_MAX_RECEIVES)
        sent = _send(mill, queue, jobs, rng)
        say(f"{len(jobs)} jobs, {sum(len(job.asks) for job in jobs)} rows, {sent} messages")
        rampage = Rampage(rng, options.kills, (VISIBILITY_SECONDS + 1.0, VISIBILITY_SECONDS + 8.0))
        proxy = Proxy(
            server,
            Plan(chance=Chance(options.faults, seed=options.seed)),
            gate=rampage.gate,
            delay_seconds=(0.1, 7.0),  # some are above the time-out of heartbeats
            longest_hidden_seconds=VISIBILITY_SECONDS,
            seed=options.seed,
        )
        with proxy, _fleet(options, mill, queue, proxy, server) as fleet:
            rampage.fleet = fleet
            began = time.monotonic()
            _until_empty(queue, fleet, rampage, sent, began + options.deadline_seconds, say)
            fleet.stop()
            seconds = time.monotonic() - began
        say("looking at the results")
        tally = _tally(options, queue, fleet, proxy, _check(mill, jobs, answers, proxy.written))
        return msgspec.structs.replace(tally, messages_sent=sent, seconds=seconds)


def _tally(options: Options, queue: Queue, fleet: Fleet, proxy: Proxy, found: Found) -> Tally:
    return Tally(
        seed=options.seed,
        found=found,
        messages_left=sum(queue.counts()),
        dead_letters=queue.dead,
        kills_asked=options.kills,
        kills={str(blow): count for blow, count in fleet.blows.items()},
        restarts=fleet.restarts,
        exits=dict(fleet.exits),
        ended_by_themselves=fleet.unasked,
        stuck=fleet.stuck,
        calls=proxy.calls.total(),
        faults={str(fault): count for fault, count in proxy.injected.items()},
        outcomes=dict(fleet.outcomes),
    )


def _publish(mill: Mill) -> Answers:
    """The base model and the adapters, in S3; and what they say."""
    base = tiny.make_base(mill.folder / "base")
    folders = {
        name: tiny.make_adapter(mill.folder / name, base, seed=seed, **shape)
        for seed, (name, shape) in enumerate(_ADAPTERS.items(), 1)
    }
    mill.upload(base, "tiny/")
    with ThreadPoolExecutor(2) as threads:
        versions = dict(zip(folders, threads.map(mill.push, folders.values(), folders), strict=True))
    texts = expected_texts(base, folders)
    assert len(set(texts.values())) > len(texts) // 2, (
        "the adapters hardly differ, so that mistakes would not show"
    )
    return Answers(texts, versions)


def _send(mill: Mill, queue: Queue, jobs: Sequence[Job], rng: random.Random) -> int:
    """Send every job, a few of them twice, before there is a worker; returns the number of messages."""
    bodies = []
    for job in jobs:
        uri = None
        if job.by_reference:
            key = f"{_IN}{job.id}.jsonl"
            mill.s3.put_object(Bucket=BUCKET, Key=key, Body=job.lines)
            uri = f"s3://{BUCKET}/{key}"
        bodies += [job.message(uri)] * (2 if rng.random() < _SENT_TWICE else 1)
    rng.shuffle(bodies)
    for at in range(0, len(bodies), 10):
        entries = [{"Id": str(n), "MessageBody": body} for n, body in enumerate(bodies[at : at + 10])]
        assert not mill.sqs.send_message_batch(QueueUrl=queue.url, Entries=entries).get("Failed")
    return len(bodies)


def _fleet(options: Options, mill: Mill, queue: Queue, proxy: Proxy, server: str) -> Fleet:
    environ = mill.environ | {
        "AWS_ENDPOINT_URL": proxy.endpoint,
        "LORAMILL_QUEUE_URL": queue.url.replace(server, proxy.endpoint),
        "LORAMILL_DTYPE": "float32",
        "LORAMILL_VISIBILITY_TIMEOUT_SECONDS": str(VISIBILITY_SECONDS),
        "LORAMILL_DRAIN_TIMEOUT_SECONDS": str(_DRAIN_SECONDS),
        "LORAMILL_ADAPTER_WAIT_SECONDS": "8",
    }
    if options.large:
        environ["LORAMILL_ROWS_PER_PART"] = str(options.rows_per_part)
    return Fleet(options.workers, mill.folder, environ, ["--sync"], stop_seconds=_STOP_SECONDS)


def _until_empty(
    queue: Queue, fleet: Fleet, rampage: Rampage, sent: int, deadline: float, say: Callable[[str], None]
) -> None:
    most, look_at, say_at = sent, 0.0, 0.0
    while time.monotonic() < deadline and (left := sum(queue.counts())):
        fleet.tend()
        now = time.monotonic()
        if now >= look_at:
            fleet.look()
            look_at = now + _LOOK_SECONDS
        most = max(most, left)  # a large job becomes many messages
        rampage.go_on(1 - left / most)
        if now >= say_at:
            say(f"{left} messages left, {fleet.blows.total()} blows, {fleet.restarts} restarts")
            say_at = now + _SAY_SECONDS
        time.sleep(_TICK_SECONDS)


def _check(mill: Mill, jobs: Sequence[Job], answers: Answers, written: Mapping[str, int]) -> Found:
    def read(key: str) -> tuple[bytes, str] | None:
        try:
            answer = mill.s3.get_object(Bucket=BUCKET, Key=key)
        except mill.s3.exceptions.NoSuchKey:
            return None
        return answer["Body"].read(), answer["ETag"].strip('"')

    found = check(jobs, answers, read, mill.keys(_OUT), _OUT)
    for name, count in written.items():
        if count > 1 and name.rpartition("/")[2].startswith(_COMMITS):
            found.complain(f"{name} was written {count} times")
    return found
