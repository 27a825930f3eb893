"""Looks at what a worker is given: may it do what it has to, and will the queue and the store do theirs?

Nothing is received, and nothing is left but a small object under each output prefix.
"""

import asyncio
import enum
import os
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from pathlib import Path

import msgspec

from worker.errors import LoramillError, ObjectExists, ObjectNotFound, QueueUnavailable, StoreRefused
from worker.settings import Settings
from worker.transport.clients import Clients
from worker.transport.queue import Outcome, QueueInfo, SqsQueue
from worker.transport.store import S3Store, Store
from worker.wire.places import as_folder

_PROBE, _RECEIPT = ".loramill-doctor", "loramill-doctor"
_FEWEST_RECEIVES = 3
_DAY_SECONDS = 86_400


class Verdict(enum.StrEnum):
    OK = "ok"
    WARNING = "warning"
    """It works, and will hurt some day."""
    FAILED = "failed"


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at."""

    what: str
    verdict: Verdict
    message: str


Findings = list[Finding]


async def examine(settings: Settings) -> Findings:
    """Everything that `settings` name, as far as a worker would use it. Raises SettingsError only."""
    async with Clients(max_attempts=2) as clients:
        store = S3Store(clients)
        looks = [
            _settings(settings),
            *([_queue(clients, settings.queue_url)] if settings.queue_url else []),
            *(_outputs(store, prefix) for prefix in _written(settings)),
            *(_read(store, f"input {prefix}", prefix) for prefix in settings.input_prefixes),
            *([_read(store, f"adapters {uri}", uri)] if (uri := settings.mirror_uri) else []),
            *([_events(clients, url)] if (url := settings.adapters_events_queue_url) else []),
            *([_weights(store, settings.weights)] if settings.weights else []),
            _folders(settings),
            *([_sharing(settings)] if settings.tensor_parallel_degree != 1 else []),
        ]
        return [finding for found in await asyncio.gather(*looks) for finding in found]


async def _settings(settings: Settings) -> Findings:
    """Those without which no worker starts."""
    needed = {"QUEUE_URL": settings.queue_url, "OUTPUT_PREFIXES": settings.output_prefixes}
    if not any(needed.values()):
        needed = {}  # it answers calls over HTTP
    return [
        Finding(f"setting {name}", Verdict.FAILED, "it is not set, and a worker needs it")
        for name, value in (needed | {"MODEL": settings.model}).items()
        if not value
    ]


async def _queue(clients: Clients, url: str) -> Findings:
    queue = SqsQueue(clients, url)
    what = f"queue {url}"

    async def look() -> Findings:
        info = await queue.describe()
        # A receipt that nobody has: what is answered is whether we may.
        _refuse_failed(await queue.extend([_RECEIPT], 0))
        _refuse_failed(await queue.delete([_RECEIPT]))
        count = f"{info.messages} messages wait, {info.in_flight} are in flight"
        found = [Finding(what, Verdict.OK, count), *_habits(what, info)]
        if info.dead_letter_arn is not None:
            found += await _dead_letters(clients, info)
        return found

    return await _judged(what, look)


def _refuse_failed(outcome: Outcome) -> None:
    for reason in outcome.failed.values():
        raise QueueUnavailable(reason)


def _habits(what: str, info: QueueInfo) -> Findings:
    """What a queue's settings will do to messages some day."""
    found = []
    if info.max_receive_count is None:
        found.append("it has no redrive policy: a message that ends the worker is received for ever")
    elif info.max_receive_count < _FEWEST_RECEIVES:
        found.append(
            f"maxReceiveCount is {info.max_receive_count}: a stopped worker or two make a good message a "
            f"dead letter; {_FEWEST_RECEIVES} or more is safer"
        )
    if info.retention_seconds is not None and info.retention_seconds < _DAY_SECONDS:
        found.append(
            f"MessageRetentionPeriod is {info.retention_seconds} seconds: jobs that wait longer are gone"
        )
    return [Finding(what, Verdict.WARNING, message) for message in found]


async def _dead_letters(clients: Clients, info: QueueInfo) -> Findings:
    arn = str(info.dead_letter_arn)
    what = f"dead-letter queue {arn}"
    try:
        dead = await (await SqsQueue.of_arn(clients, arn)).describe()
    except LoramillError as error:
        return [Finding(what, Verdict.WARNING, f"it cannot be looked at: {error}")]
    found = [Finding(what, Verdict.OK, f"{dead.messages} messages")]
    if dead.messages:
        found.append(Finding(what, Verdict.WARNING, "messages are in it: `loramill redrive` sends them back"))
    if None not in {dead.retention_seconds, info.retention_seconds} and (
        int(dead.retention_seconds or 0) <= int(info.retention_seconds or 0)
    ):
        text = "its MessageRetentionPeriod counts from when a message was first sent, and is not longer than"
        found.append(Finding(what, Verdict.WARNING, f"{text} the queue's: letters may be gone as they come"))
    return found


async def _outputs(store: Store, prefix: str) -> Findings:
    what = f"output {prefix}"
    uri = prefix + _PROBE

    async def look() -> Findings:
        try:
            await store.get(uri + "-not-there")
        except ObjectNotFound:
            pass
        except StoreRefused as error:
            if "AccessDenied" not in str(error):
                raise
            text = "s3:ListBucket is missing: without it S3 says forbidden of what is not there"
            return [Finding(what, Verdict.FAILED, f"{text} ({error})")]
        await _put_once(store, uri)
        try:
            await store.put_if_absent(uri, b"")
        except ObjectExists:
            await store.get(uri)
            return [Finding(what, Verdict.OK, "conditional writes and reads work")]
        text = "the store ignores If-None-Match: two workers could both commit a job"
        return [Finding(what, Verdict.FAILED, text)]

    return await _judged(what, look)


async def _put_once(store: Store, uri: str) -> None:
    with suppress(ObjectExists):  # an earlier look's
        await store.put_if_absent(uri, b"`loramill doctor` was here.\n", "text/plain")


async def _read(store: Store, what: str, uri: str) -> Findings:
    async def look() -> Findings:
        first = await _first(store, uri)
        if first is None:
            return [Finding(what, Verdict.WARNING, "nothing is there yet")]
        await _read_a_byte(store, first)
        return [Finding(what, Verdict.OK, "listing and reading work")]

    return await _judged(what, look)


async def _events(clients: Clients, url: str) -> Findings:
    what = f"events {url}"

    async def look() -> Findings:
        _refuse_failed(await SqsQueue(clients, url).delete([_RECEIPT]))
        return [Finding(what, Verdict.OK, "messages may be deleted")]

    return await _judged(what, look)


async def _weights(store: Store, weights: str) -> Findings:
    what = f"model {weights}"

    async def look() -> Findings:
        if weights.startswith("s3://"):
            prefix = f"{weights.rstrip('/')}/"
            await _first(store, prefix)
            there = await store.head(f"{prefix}config.json") is not None
        elif await asyncio.to_thread(Path(weights).is_dir):
            there = await asyncio.to_thread((Path(weights) / "config.json").is_file)
        else:
            return [Finding(what, Verdict.OK, "a name on a model hub, which was not asked")]
        text = "config.json is there" if there else "config.json is not there"
        return [Finding(what, Verdict.OK if there else Verdict.FAILED, text)]

    return await _judged(what, look)


async def _folders(settings: Settings) -> Findings:
    folders = {"cache": settings.cache_path}
    if settings.sync and settings.adapters_path is not None:
        folders["adapters folder"] = settings.adapters_path
    found = []
    for name, folder in folders.items():
        found += await _folder_of(f"{name} {folder}", folder)
    return found


async def _sharing(settings: Settings) -> Findings:
    """Whether the devices are there, and the model can be divided, as far as its files are here."""
    what = f"tensor parallelism of {settings.tensor_parallel_degree or 'all GPUs'}"

    def look_at() -> Findings:
        from worker.engine.base_model import degree_of, resolve_device  # noqa: PLC0415 (torch)
        from worker.engine.parallel.build import check_sharing  # noqa: PLC0415

        degree = degree_of(settings.tensor_parallel_degree, resolve_device(settings.device))
        weights = settings.weights
        local = weights if weights and Path(weights).is_dir() else None
        check_sharing(settings.device, degree, local, trust_remote_code=settings.trust_remote_code)
        seen = "the devices are there" + ("" if local is None else ", and the model can be divided")
        return [Finding(what, Verdict.OK, seen)]

    async def look() -> Findings:
        return await asyncio.to_thread(look_at)

    return await _judged(what, look)


async def _folder_of(what: str, folder: Path) -> Findings:
    async def look() -> Findings:
        place = await asyncio.to_thread(_nearest, folder)
        if os.access(place, os.W_OK | os.X_OK) and await asyncio.to_thread(place.is_dir):
            return [Finding(what, Verdict.OK, "can be written")]
        return [Finding(what, Verdict.FAILED, f"{place} is no folder that can be written")]

    return await _judged(what, look)


def _nearest(folder: Path) -> Path:
    """The folder itself, or that in which it would be made."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


def _written(settings: Settings) -> list[str]:
    letters = settings.dead_letter_uri
    return [*settings.output_prefixes, *([letters] if letters else [])]


async def _first(store: Store, uri: str) -> str | None:
    async with aclosing(store.list(uri)) as listed:
        async for stored in listed:
            return stored.uri
    return None


async def _read_a_byte(store: Store, uri: str) -> None:
    stored = await store.head(uri)
    if stored is not None and stored.size:
        async with aclosing(store.stream(stored, 0, 1)) as chunks:
            await anext(chunks)


async def _judged(what: str, look: Callable[[], Awaitable[Findings]]) -> Findings:
    try:
        return await look()
    except (LoramillError, OSError) as error:
        return [Finding(what, Verdict.FAILED, str(error))]


def least_policy(settings: Settings) -> dict[str, object]:
    """The IAM policy that a worker with these settings needs, and no more."""
    statements: list[dict[str, object]] = []

    def allow(sid: str, actions: list[str], resources: list[str], **conditions: object) -> None:
        if resources:
            statements.append(
                {"Sid": sid, "Effect": "Allow", "Action": actions, "Resource": resources} | conditions
            )

    use = ["sqs:ReceiveMessage", "sqs:DeleteMessage"]
    if settings.queue_url:
        more = ["sqs:ChangeMessageVisibility", "sqs:GetQueueAttributes", "sqs:SendMessage"]
        allow("Jobs", use + more, [queue_arn(settings.queue_url)])
    if settings.adapters_events_queue_url:
        allow("AdapterEvents", use, [queue_arn(settings.adapters_events_queue_url)])
    places = (settings.mirror_uri, settings.model_uri, settings.weights)
    beside = [uri.rpartition("/")[0] if uri.endswith(".json") else uri for uri in settings.workflows]
    read = [*dict.fromkeys(as_folder(uri) for uri in (*places, *beside) if uri and uri.startswith("s3://"))]
    allow(
        "Results",
        ["s3:GetObject", "s3:PutObject", "s3:AbortMultipartUpload"],
        [_objects(prefix) for prefix in _written(settings)],
    )
    allow("ModelAndAdapters", ["s3:GetObject"], [_objects(uri) for uri in read])
    allow("Inputs", ["s3:GetObject"], [_objects(prefix) for prefix in settings.input_prefixes])
    for number, uri in enumerate(dict.fromkeys([*_written(settings), *read, *settings.input_prefixes])):
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        allow(
            f"List{number}",
            ["s3:ListBucket"],
            [f"arn:aws:s3:::{bucket}"],
            Condition={"StringLike": {"s3:prefix": [f"{as_folder(prefix)}*"]}},
        )
    return {"Version": "2012-10-17", "Statement": statements}


def queue_arn(url: str) -> str:
    """By the form of AWS's own URLs: https://sqs.REGION.amazonaws.com/ACCOUNT/NAME."""
    host, _, path = url.partition("://")[2].partition("/")
    account, _, name = path.partition("/")
    parts = host.split(".")
    region = parts[1] if parts[0] == "sqs" and len(parts) > 2 else "*"
    return f"arn:{_partition(region)}:sqs:{region}:{account}:{name}"


def _partition(region: str) -> str:
    return {"cn": "aws-cn", "us-gov": "aws-us-gov"}.get(region.rpartition("-")[0].rpartition("-")[0], "aws")


def _objects(uri: str) -> str:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    return f"arn:aws:s3:::{bucket}/{as_folder(prefix)}*"
