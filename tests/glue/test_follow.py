"""The results of a job, fetched: all of them in order, or an error that says why not."""

import asyncio
import gzip
import hashlib
import io
import os
import threading

import msgspec
import pytest

from worker import wire
from worker.errors import LoramillError, StoreUnavailable
from worker.jobs import Failure, Output
from worker.sender.follow import _write, cancel, save_results, stream_results, wait_for_manifest
from worker.transport.memory import MemoryStore
from worker.wire.manifest import Manifest, OutputFile, Status

PARTS = [b'{"id": "0"}\n{"id": "1"}\n', b"", b'{"id": "2"}\n']
OUTPUT = Output("s3://out/jobs/")


def manifest(parts=(), **changes):
    given = {"status": Status.COMPLETED, "worker": "w", "created_at": 0.0, "finished_at": 1.0}
    return Manifest(job_id="job", outputs=tuple(parts), software_version="0", **given | changes)


async def committed(store, **changes):
    """A job whose results are in three parts."""
    parts = []
    for number, body in enumerate(PARTS):
        stored = await store.put(f"s3://out/jobs/job/results-{number}", body)
        parts.append(OutputFile(stored.uri, stored.etag, hashlib.sha256(body).hexdigest(), 1))
    found = manifest(parts, **changes)
    await store.put(wire.manifest_uri(OUTPUT, "job"), wire.encode_manifest(found))
    return found


def play(scenario):
    store = MemoryStore()
    return asyncio.run(asyncio.wait_for(scenario(store), 20))


async def collected(store, found):
    return b"".join([chunk async for chunk in stream_results(store, found)])


def test_parts_come_in_the_order_of_the_manifest():
    async def scenario(store):
        await committed(store)
        found = await wait_for_manifest(store, OUTPUT, "job", 0)
        assert await collected(store, found) == b"".join(PARTS)

    play(scenario)


@pytest.mark.parametrize("name", ["results.jsonl", "results.jsonl.gz"])
def test_file_is_there_whole(name, tmp_path):
    async def scenario(store):
        await save_results(store, await committed(store), tmp_path / name)

    play(scenario)
    data = (tmp_path / name).read_bytes()
    assert (gzip.decompress(data) if name.endswith(".gz") else data) == b"".join(PARTS)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_link_stays_and_what_it_leads_to_is_written(tmp_path):
    target, link = tmp_path / "folder" / "target.jsonl", tmp_path / "link"
    target.parent.mkdir()
    link.symlink_to(target)

    async def scenario(store):
        await save_results(store, await committed(store), link)

    play(scenario)
    assert link.is_symlink()
    assert target.read_bytes() == b"".join(PARTS)


def test_pipe_is_written_to_and_stays_one(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()

    async def scenario(store):
        await save_results(store, await committed(store), pipe)

    play(scenario)
    reader.join(10)
    assert got == [b"".join(PARTS)]
    assert pipe.is_fifo()


def test_folder_is_no_file(tmp_path):
    async def scenario(store):
        with pytest.raises(IsADirectoryError):
            await save_results(store, await committed(store), tmp_path)

    play(scenario)


def test_file_has_the_rights_of_any_new_file(tmp_path):
    async def scenario(store):
        await save_results(store, await committed(store), tmp_path / "results")

    play(scenario)
    (tmp_path / "plain").touch()
    assert (tmp_path / "results").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_part_that_is_not_what_the_manifest_says_is_told():
    async def scenario(store):
        found = await committed(store)
        parts = [*found.outputs[:2], msgspec.structs.replace(found.outputs[2], sha256="0" * 64)]
        with pytest.raises(LoramillError, match="results-2 is damaged"):
            await collected(store, manifest(parts))

    play(scenario)


@pytest.mark.parametrize("retryable", [True, False])
def test_failure_that_may_be_tried_again_is_not_the_end(retryable):
    async def scenario(store):
        failure = Failure("gave_up", "the worker was stopped", retryable)
        await committed(store, status=Status.FAILED, error=failure)
        assert (await wait_for_manifest(store, OUTPUT, "job", 0)).error == failure
        waiting = asyncio.create_task(wait_for_manifest(store, OUTPUT, "job", 10))
        await asyncio.sleep(0.01)
        assert waiting.done() is not retryable
        await committed(store)
        assert ((await waiting).error is None) is retryable

    play(scenario)


def test_job_that_goes_on_can_be_cancelled_and_one_that_ended_cannot():
    async def scenario(store):
        uri = wire.cancel_uri(OUTPUT, "job")
        assert await cancel(store, OUTPUT, "job")
        assert await cancel(store, OUTPUT, "job")
        assert await store.head(uri)
        await committed(store)
        assert not await cancel(store, OUTPUT, "job")
        await committed(store, status=Status.FAILED, error=Failure("gave_up", "stopped", retryable=True))
        assert await cancel(store, OUTPUT, "job")

    play(scenario)


def test_file_that_is_there_stays_when_the_results_cannot_be_had(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text("of last time")

    async def scenario(store):
        found = await committed(store)
        await store.put(found.outputs[2].uri, b"somebody else's")
        with pytest.raises(StoreUnavailable, match="overwritten"):
            await save_results(store, found, path)

    play(scenario)
    assert path.read_text() == "of last time"
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]


def test_part_that_is_gone_is_told_by_name():
    async def scenario(store):
        found = manifest([OutputFile("s3://out/jobs/job/gone", "etag", "", 1)])
        with pytest.raises(LoramillError, match="s3://out/jobs/job/gone is gone"):
            await collected(store, found)

    play(scenario)


def test_job_that_failed_as_a_whole_says_why():
    async def scenario(store):
        found = await committed(store, status=Status.FAILED, error=Failure("invalid_message", "it is no job"))
        with pytest.raises(LoramillError, match="job job failed: it is no job"):
            await collected(store, found)

    play(scenario)


def test_manifest_is_waited_for_and_no_longer_than_asked():
    async def scenario(store):
        with pytest.raises(LoramillError, match=r"job job has not ended: .*manifest.json did not appear$"):
            await wait_for_manifest(store, OUTPUT, "job", 0)
        waiting = asyncio.create_task(wait_for_manifest(store, OUTPUT, "job", 10))
        await asyncio.sleep(0)
        await committed(store)
        assert (await waiting).job_id == "job"
        with pytest.raises(LoramillError, match=r"within 0\.01 seconds"):
            await wait_for_manifest(store, OUTPUT, "another", 0.01)

    play(scenario)


def test_standard_output_that_is_full_is_told():
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    async def scenario(store):
        with pytest.raises(OSError, match="No space"):
            await _write(stream_results(store, await committed(store)), Full())

    play(scenario)
