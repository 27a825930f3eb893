"""The real client of the store, and what each fault on the way does to it."""

import asyncio
from contextlib import nullcontext, suppress

import pytest

from tests.faults.kinds import Fault
from tests.faults.plans import Rule
from worker.errors import ObjectExists, ObjectNotFound, StoreUnavailable
from worker.transport import multipart
from worker.transport.clients import Clients
from worker.transport.store import S3Store

REFUSALS = [Fault.THROTTLE, Fault.ERROR, Fault.UNAVAILABLE, Fault.DROP]
LOST_ANSWERS = [Fault.LATE_ERROR, Fault.LATE_DROP]
FOREVER = 1000
PARTS = ["CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"]


def play(bucket, scenario, *, max_attempts=2):
    async def at_once(_):
        pass

    async def main():
        async with Clients(max_attempts=max_attempts) as clients:
            await scenario(S3Store(clients, sleep=at_once), f"s3://{bucket}/")

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file that goes in two parts."""
    monkeypatch.setattr(multipart, "LEAST_BYTES", 5 << 20)
    monkeypatch.setattr(multipart, "PART_BYTES", 5 << 20)
    path = tmp_path / "large"
    path.write_bytes(bytes(range(256)) * (6 << 12))
    return path


@pytest.mark.parametrize("fault", [*REFUSALS, *LOST_ANSWERS, Fault.DELAY])
def test_fault_that_passes_is_not_noticed(fault, bucket, proxy):
    async def scenario(store, prefix):
        await store.put(f"{prefix}k", b"body")
        assert (await store.get(f"{prefix}k"))[0] == b"body"
        assert (await store.head(f"{prefix}k")).size == 4
        assert [one.uri async for one in store.list(prefix)] == [f"{prefix}k"]

    operations = ["PutObject", "GetObject", "HeadObject", "ListObjectsV2"]
    proxy.plan.rules += [Rule(fault, operation) for operation in operations]
    play(bucket, scenario)
    assert proxy.injected == {fault: 4}


@pytest.mark.parametrize("fault", [*REFUSALS, *LOST_ANSWERS])
def test_fault_that_lasts_is_unavailable_and_never_a_missing_object(fault, bucket, proxy):
    async def scenario(store, prefix):
        stored = await store.put(f"{prefix}k", b"body")
        for operation in ("PutObject", "GetObject", "HeadObject", "ListObjectsV2"):
            proxy.plan.rules.append(Rule(fault, operation, times=FOREVER))
        for call in (
            store.put(f"{prefix}k", b"x"),
            store.put_if_absent(f"{prefix}other", b"x"),
            store.get(f"{prefix}k"),
            store.head(f"{prefix}k"),
            anext(store.list(prefix)),
            anext(store.stream(stored)),
        ):
            with pytest.raises(StoreUnavailable):
                await call

    play(bucket, scenario, max_attempts=1)


@pytest.mark.parametrize("fault", [*REFUSALS, Fault.CONFLICT])
def test_conditional_write_that_was_refused_once_is_done_once(fault, bucket, proxy):
    async def scenario(store, prefix):
        await store.put_if_absent(f"{prefix}k", b"first", metadata={"by": "first"})
        with pytest.raises(ObjectExists):
            await store.put_if_absent(f"{prefix}k", b"second")
        body, stored = await store.get(f"{prefix}k")
        assert (body, stored.metadata) == (b"first", {"by": "first"})

    proxy.plan.rules.append(Rule(fault, "PutObject"))
    play(bucket, scenario)


@pytest.mark.parametrize("fault", LOST_ANSWERS)
def test_conditional_write_whose_answer_was_lost_finds_its_own_object(fault, bucket, proxy):
    async def scenario(store, prefix):
        with pytest.raises(ObjectExists):
            await store.put_if_absent(f"{prefix}k", b"mine")
        assert (await store.get(f"{prefix}k"))[0] == b"mine"

    proxy.plan.rules.append(Rule(fault, "PutObject"))
    play(bucket, scenario)


@pytest.mark.parametrize("fault", [Fault.CONFLICT, Fault.ABORTED])
def test_conflict_is_waited_out_and_one_that_lasts_is_unavailable(bucket, proxy, fault):
    async def scenario(store, prefix):
        proxy.plan.rules.append(Rule(fault, "PutObject"))
        await store.put_if_absent(f"{prefix}first", b"x")
        proxy.plan.rules.append(Rule(fault, "PutObject", times=FOREVER))
        with pytest.raises(StoreUnavailable):
            await store.put_if_absent(f"{prefix}k", b"x")
        with pytest.raises(ObjectNotFound):
            await store.get(f"{prefix}k")

    play(bucket, scenario)


def test_whole_object_that_was_cut_short_is_unavailable(bucket, proxy):
    async def scenario(store, prefix):
        await store.put(f"{prefix}k", b"x" * 10_000)
        proxy.plan.rules.append(Rule(Fault.TRUNCATE, "GetObject"))
        with pytest.raises(StoreUnavailable):
            await store.get(f"{prefix}k")
        assert len((await store.get(f"{prefix}k"))[0]) == 10_000

    play(bucket, scenario)


def test_stream_that_is_cut_short_goes_on_and_is_the_same_bytes(bucket, proxy):
    async def scenario(store, prefix):
        body = bytes(range(251)) * 20_000
        stored = await store.put(f"{prefix}k", body)
        proxy.plan.rules += [
            Rule(fault, "GetObject")
            for fault in (Fault.TRUNCATE, Fault.TRUNCATE, Fault.DROP, Fault.TRUNCATE, Fault.THROTTLE)
        ]
        got = b"".join([chunk async for chunk in store.stream(stored, 17)])
        assert got == body[17:]

    play(bucket, scenario)
    assert proxy.injected == {Fault.TRUNCATE: 3, Fault.DROP: 1, Fault.THROTTLE: 1}


@pytest.mark.parametrize("operation", PARTS)
@pytest.mark.parametrize("fault", [Fault.THROTTLE, Fault.DROP, *LOST_ANSWERS])
def test_large_file_is_there_whole_after_a_fault_in_any_call(operation, fault, large, bucket, proxy, s3):
    async def scenario(store, prefix):
        # The SDK asks again, and what has ended may be somebody else's by then.
        late_end = fault in LOST_ANSWERS and operation == PARTS[-1]
        with suppress(ObjectExists) if late_end else nullcontext(), large.open("rb") as file:
            await store.put_file_if_absent(f"{prefix}k", file)
        assert (await store.get(f"{prefix}k"))[0] == large.read_bytes()

    proxy.plan.rules.append(Rule(fault, operation))
    play(bucket, scenario)
    uploads = s3.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    assert len(uploads) == (1 if fault in LOST_ANSWERS and operation == PARTS[0] else 0)


def test_large_file_that_met_a_conflict_at_its_end_is_sent_again(large, bucket, proxy, s3):
    async def scenario(store, prefix):
        with large.open("rb") as file:
            await store.put_file_if_absent(f"{prefix}k", file)

    proxy.plan.rules.append(Rule(Fault.CONFLICT, "CompleteMultipartUpload"))
    play(bucket, scenario)
    assert proxy.calls["UploadPart"] == 4
    assert "Uploads" not in s3.list_multipart_uploads(Bucket=bucket)
