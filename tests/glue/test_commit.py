"""The commit protocol, against a store in memory."""

import asyncio
import hashlib
import json

import msgspec
import pytest

from tests.glue.support import DEAD, PREFIX, World, echo, make_job, manifest_uri
from worker import wire
from worker.delivery.spool import Spool
from worker.errors import JobIdReused, ObjectExists
from worker.jobs import Delivery, Failure, Job, Output, RowResult
from worker.wire.manifest import CommittedPart, Status

RESULTS = f"{PREFIX}j/results-00000-of-00001.jsonl"
GAVE_UP = Failure("gave_up", "five times", retryable=True)
REFUSED = Failure("invalid_message", "no", retryable=False)


def body_for(job: Job, text: str | None = None) -> bytes:
    return wire.encode_rows(job, results_of(job, text), base_model="m")


def results_of(job: Job, text: str | None) -> list[RowResult]:
    """Echoes; with `text` in the place of the first."""
    results = [echo(row) for row in job.rows]
    return results if text is None else [msgspec.structs.replace(results[0], text=text), *results[1:]]


async def commit_part(world: World, job: Job, text: str | None = None) -> CommittedPart:
    with Spool(job, base_model="m") as spool:
        for result in results_of(job, text):
            await spool.add(spool.encode(result))
        return (await world.committer.commit_part(job, spool))[0]


async def commit(world: World, job: Job, text: str | None = None) -> wire.Manifest | None:
    return await world.committer.commit(job, [await commit_part(world, job, text)], 1.0)


async def fail(world: World, failure: Failure, job: Job | None = None) -> bool:
    return await world.committer.fail("j", Output(PREFIX), failure, 1.0, job)


def test_results_are_stored_before_the_manifest_that_names_them():
    world, job = World(), make_job()
    steps = world.record()
    asyncio.run(commit(world, job))
    assert steps == ["put results", "put manifest.json"]
    (output,) = world.manifest("j").outputs
    body = world.store.text(RESULTS).encode()
    assert (output.uri, output.rows) == (RESULTS, 3)
    assert output.sha256 == hashlib.sha256(body).hexdigest()


def test_manifest_tells_what_the_job_was_and_what_became_of_it():
    world, job = World(), make_job(metadata={"team": "x"}, parameters=[{}, {"typo": 1}, {}])
    manifest = asyncio.run(commit(world, job))
    assert manifest == world.manifest("j")
    assert manifest.status is Status.COMPLETED_WITH_ERRORS
    assert manifest.request_counts.total == 3
    assert manifest.request_counts.completed == 2
    assert manifest.error_counts == {"invalid_parameters": 1}
    assert manifest.metadata == {"team": "x"}
    assert (manifest.digest, manifest.created_at) == (job.digest, 999.0)
    assert (manifest.started_at, manifest.finished_at) == (1.0, 1_000_000.0)
    assert (manifest.worker, manifest.base_model, manifest.software_version) == ("w", "m", "v")


def test_a_part_without_manifest_is_summed_up_as_it_lies_there():
    async def scenario() -> None:
        world, job = World(), make_job()
        stored = await commit_part(world, job)
        assert not await world.committer.is_committed(job)
        found = await world.committer.part(job)
        assert found == stored
        assert await world.committer.commit(job, [found], 1.0) is not None
        assert world.manifest("j").usage.completion_tokens == 6

    asyncio.run(scenario())


def test_nothing_is_found_of_a_job_never_seen():
    async def scenario() -> None:
        world, job = World(), make_job()
        assert await world.committer.part(job) is None
        assert not await world.committer.is_committed(job)

    asyncio.run(scenario())


def test_a_committed_job_is_a_duplicate_for_ever():
    async def scenario() -> None:
        world, job = World(), make_job()
        assert await commit(world, job) is not None
        before = world.store.text(manifest_uri("j"))
        assert await world.committer.is_committed(job)
        assert await commit(world, job) is None
        assert world.store.text(manifest_uri("j")) == before

    asyncio.run(scenario())


def test_an_id_used_for_other_work_is_refused_at_the_manifest():
    async def scenario() -> None:
        world = World()
        await commit(world, make_job())
        with pytest.raises(JobIdReused, match="'j'"):
            await world.committer.is_committed(make_job(inputs=["else"]))

    asyncio.run(scenario())


def test_an_id_used_for_other_work_is_refused_at_the_part():
    async def scenario() -> None:
        world, job, other = World(), make_job(), make_job(inputs=["else"])
        await commit_part(world, job)
        with pytest.raises(JobIdReused):
            await world.committer.part(other)
        with pytest.raises(JobIdReused):
            await commit_part(world, other)
        assert world.store.text(RESULTS).encode() == body_for(job)

    asyncio.run(scenario())


def test_an_id_used_for_other_work_is_refused_at_the_last_step_too():
    """The other job's manifest came between our look and our commit."""

    async def scenario() -> None:
        world, job = World(), make_job()
        part = await commit_part(world, job)
        await fail(world, REFUSED)  # a malformed message under the same id
        with pytest.raises(JobIdReused):
            await world.committer.commit(job, [part], 1.0)

    asyncio.run(scenario())


def test_who_loses_the_race_for_a_part_takes_the_bytes_that_won():
    async def scenario() -> None:
        world, job = World(), make_job()
        won = body_for(job)
        first = await commit_part(world, job)
        assert body_for(job, "B") != won
        assert await commit_part(world, job, "B") == first
        assert world.store.text(RESULTS).encode() == won
        assert first.output.sha256 == hashlib.sha256(won).hexdigest()

    asyncio.run(scenario())


def test_of_many_who_race_for_a_job_one_commits_it():
    async def scenario() -> None:
        world, job = World(), make_job()
        manifests = await asyncio.gather(*(commit(world, job, str(n)) for n in range(8)))
        winners = [one for one in manifests if one is not None]
        assert winners == [world.manifest("j")]
        stored = world.store.text(RESULTS).encode()
        assert stored in [body_for(job, str(n)) for n in range(8)]
        assert winners[0].outputs[0].sha256 == hashlib.sha256(stored).hexdigest()

    asyncio.run(scenario())


def test_a_part_that_vanishes_after_it_won_is_no_part():
    async def scenario() -> None:
        world, job = World(), make_job()
        await commit_part(world, job)

        async def vanish(step: str) -> None:
            if step == "head results?":
                world.store._objects.clear()

        world.store.hook = vanish
        with pytest.raises(ObjectExists):
            await commit_part(world, job)

    asyncio.run(scenario())


def test_a_failed_manifest_written_twice_is_the_same_failure():
    async def scenario() -> None:
        world = World()
        assert await fail(world, REFUSED)
        before = world.store.text(manifest_uri("j"))
        assert await fail(world, REFUSED), "an attempt that died before its ack comes back to this"
        assert world.store.text(manifest_uri("j")) == before
        assert world.manifest("j").status is Status.FAILED

    asyncio.run(scenario())


def test_a_failure_does_not_replace_another_failure_or_a_success():
    async def scenario() -> None:
        for earlier in ("failure", "success"):
            world = World()
            if earlier == "failure":
                await fail(world, Failure("forbidden_output", "other"))
            else:
                await commit(world, make_job())
            before = world.store.text(manifest_uri("j"))
            assert not await fail(world, REFUSED)
            assert not await fail(world, GAVE_UP, make_job())
            assert world.store.text(manifest_uri("j")) == before

    asyncio.run(scenario())


def test_gave_up_is_replaced_by_a_later_success():
    async def scenario() -> None:
        world, job = World(), make_job()
        assert await fail(world, GAVE_UP, job)
        assert world.manifest("j").request_counts.failed == 3
        assert not await world.committer.is_committed(job)
        assert await commit(world, job) is not None
        assert world.manifest("j").status is Status.COMPLETED
        assert world.manifest("j").error is None

    asyncio.run(scenario())


def test_a_late_gave_up_replaces_nothing_not_even_another():
    async def scenario() -> None:
        world, job = World(), make_job()
        other = Failure("gave_up", "four times", retryable=True)
        assert await fail(world, other, job)
        assert not await fail(world, GAVE_UP, job)
        assert world.manifest("j").error == other

    asyncio.run(scenario())


def test_gave_up_keeps_the_id_for_nobody():
    """Who gave up may have been another sender's job of the same id, while the first one is at work."""

    async def scenario() -> None:
        world, job = World(), make_job()
        await fail(world, GAVE_UP, make_job(inputs=["else"]))
        assert not await world.committer.is_committed(job)
        assert await commit(world, job) is not None
        assert world.manifest("j").digest == job.digest

    asyncio.run(scenario())


def test_dead_letter_holds_the_whole_message_and_may_be_written_twice():
    async def scenario() -> None:
        world = World()
        delivery = Delivery(message_id="m-1", body="\ud800{", receipt="r", attributes={"adapter": "ä"})
        for _ in range(2):
            await world.committer.write_dead_letter(DEAD, delivery, REFUSED)
        (uri,) = world.store.uris
        assert uri == f"{DEAD}m-1.json"
        letter = json.loads(world.store.text(uri))
        assert letter["body"] == delivery.body
        assert letter["attributes"] == delivery.attributes
        assert letter["error"]["code"] == "invalid_message"

    asyncio.run(scenario())
