"""One delivery from message to committed results, stopped at every step and tried again."""

import asyncio
import gc
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.glue.malformed import MALFORMED, Malformed
from tests.glue.support import (
    DEAD,
    PREFIX,
    VISIBILITY,
    Died,
    World,
    body_of,
    make_job,
    make_runner,
    nothing,
    run_rows,
    until,
)
from worker.adapters.directory import AdapterDirectory
from worker.delivery.rows import EngineRows
from worker.delivery.runner import backoff_seconds
from worker.errors import EngineFailed, LeaseLost, QueueRefused, QueueUnavailable, StoreUnavailable
from worker.jobs import Completion, FinishReason, InferenceRequest
from worker.wire.manifest import Status

STEPS = [
    "get manifest.json",
    "head results",
    "head cancel",
    "run",
    "put results",
    "put manifest.json",
    "delete",
]
# A get that finds nothing raises, so it has no "after".
MOMENTS = [f"{step}?" for step in STEPS] + [f"{step}!" for step in STEPS if not step.startswith("get")]


@pytest.fixture(autouse=True)
def _bury_the_dead():
    """What a killed scenario leaves unfinished is collected here, not in the middle of a later test."""
    yield
    gc.collect()


def at(moment: str, act: Callable[[], Any]) -> Callable[[str], Any]:
    """A hook that acts when the moment comes, the first time only."""
    waiting = [moment]

    async def hook(step: str) -> None:
        if step in waiting:
            waiting.remove(step)
            outcome = act()
            if isinstance(outcome, BaseException):
                raise outcome
            if outcome is not None:
                await outcome

    return hook


def assert_exactly_once(world: World, inputs: list[str]) -> None:
    lines = world.results("j")
    assert [line["index"] for line in lines] == list(range(len(inputs)))
    assert [line["generated_text"] for line in lines] == [text.upper() for text in inputs]
    manifest = world.manifest("j")
    assert manifest.status is Status.COMPLETED
    (output,) = manifest.outputs
    assert output.sha256 == hashlib.sha256(world.store.text(output.uri).encode()).hexdigest()
    assert len(world.store.uris) == 2


async def assert_all_gone(world: World) -> None:
    assert await world.left() == 0
    assert (await world.dead_letters.describe()).messages == 0


def test_the_message_is_deleted_after_results_and_manifest():
    async def scenario() -> None:
        world = World()
        await world.send()
        steps = world.record()
        assert await world.handle_next()
        assert [step for step in steps if not step.startswith("head")] == [
            "run",
            "put results",
            "put manifest.json",
            "delete",
        ]
        assert_exactly_once(world, ["a", "b", "c"])
        await assert_all_gone(world)
        assert world.counted("committed") == 1
        assert world.metrics.rows.labels("completed")._value.get() == 3

    asyncio.run(scenario())


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_process_that_dies_at_any_step_leaves_every_row_to_be_had_once(moment: str):
    async def scenario() -> None:
        world = World()
        await world.send()
        world.watch(at(moment, Died))
        with pytest.raises(Died):
            await world.handle_next()
        assert await world.left() == (0 if moment == "delete!" else 1), "acked before the commit"
        world.watch(nothing)
        await world.handle_all()
        assert_exactly_once(world, ["a", "b", "c"])
        await assert_all_gone(world)
        if moment.startswith(("put manifest.json", "delete")) or moment == "put results!":
            assert len(world.rows.computed) == 3, "committed rows are not computed again"

    asyncio.run(scenario())


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_delivery_cancelled_at_any_step_is_given_back_at_once(moment: str):
    async def scenario() -> None:
        world = World()
        await world.send()
        reached, never = asyncio.Event(), asyncio.Event()

        async def stop_here() -> None:
            reached.set()
            await never.wait()

        world.watch(at(moment, stop_here))
        async with world.keeper() as keeper:
            lease = await world.receive(keeper)
            handling = asyncio.create_task(world.runner.handle(lease))
            await reached.wait()
            handling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await handling
            assert not keeper.open_leases
        assert world.queue.released == [0]
        assert world.counted("released") == 1
        assert (await world.queue.describe()).messages == (0 if moment == "delete!" else 1)
        world.watch(nothing)
        await world.handle_all()
        assert_exactly_once(world, ["a", "b", "c"])
        await assert_all_gone(world)

    asyncio.run(scenario())


@pytest.mark.parametrize("moment", MOMENTS)
def test_trouble_at_any_step_gives_the_message_back_with_a_backoff(moment: str):
    error = QueueUnavailable("down") if moment.startswith("delete") else StoreUnavailable("down")

    async def scenario() -> None:
        world = World()
        await world.send()
        world.watch(at(moment, lambda: error))
        assert await world.handle_next()
        (delay,) = world.queue.released
        assert 7 <= delay <= 10
        assert world.counted("released") == 1
        if moment != "delete!":
            assert await world.left() == 1
            assert not await world.handle_next(), "the message stays hidden for the back-off"
        await world.handle_all()
        assert_exactly_once(world, ["a", "b", "c"])
        await assert_all_gone(world)

    asyncio.run(scenario())


def test_an_error_of_our_own_gives_the_message_back_and_does_not_escape():
    async def scenario() -> None:
        world = World()
        await world.send()
        world.watch(at("run?", lambda: ZeroDivisionError("bug")))
        assert await world.handle_next()
        await world.handle_all()
        assert_exactly_once(world, ["a", "b", "c"])

    asyncio.run(scenario())


def test_backoff_doubles_up_to_fifteen_minutes():
    for attempt in range(1, 40):
        whole = min(900, 5 * 2**attempt)
        assert int(0.75 * whole) <= backoff_seconds(attempt) <= whole


def test_lost_lease_is_never_acked():
    async def scenario() -> None:
        world = World()
        await world.send()
        reached, never = asyncio.Event(), asyncio.Event()

        async def hang() -> None:
            reached.set()
            await never.wait()

        steps: list[str] = []

        async def hook(step: str) -> None:
            steps.append(step)
            await at_run(step)

        at_run = at("run?", hang)
        world.watch(hook)
        async with world.keeper() as keeper:
            lease = await world.receive(keeper)
            handling = asyncio.create_task(world.runner.handle(lease))
            await reached.wait()
            world.queue.lose = True
            await world.clock.advance(VISIBILITY / 2)
            await handling
        assert lease.state.value == "lost"
        assert world.rows.cancelled == 1, "the work goes on for nobody"
        assert not {"delete?", "release?"} & set(steps)
        assert world.counted("lost") == 1
        world.queue.lose = False
        world.watch(nothing)
        await world.handle_all()
        assert_exactly_once(world, ["a", "b", "c"])

    asyncio.run(scenario())


def test_a_lease_that_ran_out_while_the_results_were_stored_is_not_acked():
    async def scenario() -> None:
        world = World()
        await world.send()
        async with world.keeper() as keeper:
            lease = await world.receive(keeper)

            async def outlive() -> None:
                world.clock._now += 2 * VISIBILITY  # nobody gets to run meanwhile, the keeper neither

            steps = world.record(at("put manifest.json!", outlive))
            await world.runner.handle(lease)
            assert "delete" not in steps
            assert world.counted("lost") == 1
        world.watch(nothing)
        await world.handle_all()
        assert_exactly_once(world, ["a", "b", "c"])
        assert world.counted("duplicate") == 1

    asyncio.run(scenario())


class HangingBridge:
    """In the place of Bridge: requests that never end, unless they are dropped."""

    def __init__(self) -> None:
        self.requests: dict[str, InferenceRequest] = {}
        self.dropped: list[str] = []
        self.failure: BaseException | None = None

    async def submit(self, request: InferenceRequest, adapter: object = None, *_: object) -> Completion:
        self.requests[request.id] = request
        try:
            if self.failure is not None:
                raise self.failure
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.dropped.append(request.id)
            raise
        raise AssertionError


class AnsweringBridge:
    """In the place of Bridge: answers at once, or with what `answer` makes of the request."""

    async def submit(self, request: InferenceRequest, adapter: object = None, *_: object) -> Completion:
        return Completion(
            request_id=request.id,
            text="ok",
            token_ids=(1,),
            finish_reason=FinishReason.LENGTH,
            prompt_tokens=len(request.prompt),
        )


class LettersTokenizer:
    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode())


def row_runner(world: World, bridge: Any, *, max_at_once: int = 8, folder: Path | None = None) -> EngineRows:
    adapters = AdapterDirectory(folder, 30.0, clock=world.clock, sleep=world.clock.sleep)
    tokenizer: Any = LettersTokenizer()
    return make_runner(bridge, tokenizer, adapters, max_rows=max_at_once, clock=world.clock)


def test_a_lost_lease_drops_its_requests_from_the_engine():
    async def scenario() -> None:
        world, bridge = World(), HangingBridge()
        world.rows = row_runner(world, bridge)
        await world.send()
        async with world.keeper() as keeper:
            lease = await world.receive(keeper)
            handling = asyncio.create_task(world.runner.handle(lease))
            await until(lambda: len(bridge.requests) == 3)
            assert world.rows.in_flight == 3
            world.queue.lose = True
            await world.clock.advance(VISIBILITY / 2)
            await handling
        assert sorted(bridge.dropped) == sorted(bridge.requests)
        assert world.rows.in_flight == 0

    asyncio.run(scenario())


def test_at_most_so_many_rows_of_a_job_are_with_the_engine():
    async def scenario() -> None:
        world, bridge = World(), HangingBridge()
        world.rows = row_runner(world, bridge, max_at_once=2)
        running = asyncio.create_task(run_rows(world.rows, make_job(inputs=["x"] * 9)))
        await until(lambda: len(bridge.requests) == 2)
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(bridge.requests) == 2
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(scenario())


def test_engine_failure_gives_the_message_back_at_once_and_is_passed_on():
    async def scenario() -> None:
        world, bridge = World(), HangingBridge()
        world.rows = row_runner(world, bridge)
        bridge.failure = EngineFailed("gone")
        await world.send()
        with pytest.raises(EngineFailed, match="gone"):
            await world.handle_next()
        assert world.queue.released == [0]
        assert (await world.queue.describe()).messages == 1
        assert not world.store.uris
        assert world.counted("released") == 1

    asyncio.run(scenario())


def test_engine_failure_on_the_last_receive_says_that_we_gave_up():
    """The queue moves the message away at its next receive: who waits for the manifest must be told."""

    async def scenario() -> None:
        world = World(max_receive_count=1)
        await world.send()
        world.watch(at("run?", lambda: EngineFailed("gone")))
        with pytest.raises(EngineFailed):
            await world.handle_next()
        assert await world.left() == 1
        error = world.manifest("j").error
        assert error is not None
        assert (error.code, error.retryable) == ("gave_up", True)

    asyncio.run(scenario())


def test_engine_failure_is_passed_on_even_when_the_queue_refuses_the_release():
    async def scenario() -> None:
        world = World()
        await world.send()

        async def hook(step: str) -> None:
            if step == "run?":
                raise EngineFailed("gone")
            if step == "release?":
                raise QueueRefused("access denied")

        world.watch(hook)
        with pytest.raises(EngineFailed):
            await world.handle_next()

    asyncio.run(scenario())


def test_a_delivery_cancelled_while_it_is_given_back_ends_its_lease():
    """The drain's time is up while the last receive's failed manifest is being written."""

    async def scenario() -> None:
        world = World(max_receive_count=1)
        await world.send()
        reached, never = asyncio.Event(), asyncio.Event()

        async def hook(step: str) -> None:
            if step == "run?":
                raise StoreUnavailable("down")
            if step == "put manifest.json?":
                reached.set()
                await never.wait()

        world.watch(hook)
        async with world.keeper() as keeper:
            lease = await world.receive(keeper)
            handling = asyncio.create_task(world.runner.handle(lease))
            await reached.wait()
            handling.cancel()
            await asyncio.gather(handling, return_exceptions=True)
            assert lease.state.value == "released"

    asyncio.run(scenario())


@pytest.mark.parametrize("bad", MALFORMED.values(), ids=list(MALFORMED))
def test_malformed_message_leaves_word_and_is_deleted(bad: Malformed):
    async def scenario() -> None:
        world = World()
        message_id = await world.queue.send(bad.body, bad.attributes)
        await world.send()
        await world.handle_all()
        await assert_all_gone(world)
        assert world.counted("failed" if bad.leaves == "manifest" else "dead_letter") == 1
        if bad.leaves == "manifest":
            manifest = world.manifest(bad.job_id or message_id)
            assert manifest.status is Status.FAILED
            reason = manifest.error
            assert reason is not None
            assert (reason.code, reason.retryable) == ("invalid_message", False)
            assert bad.says in reason.message
        else:
            letter = json.loads(world.store.text(f"{DEAD}{message_id}.json"))
            assert letter["body"] == bad.body
            assert bad.says in letter["error"]["message"]
        assert [line["generated_text"] for line in world.results("j")] == ["A", "B", "C"]
        assert world.manifest("j").status is Status.COMPLETED

    asyncio.run(scenario())


@pytest.mark.parametrize("moment", ["put manifest.json?", "put manifest.json!", "delete?"])
def test_a_refusal_interrupted_at_any_step_ends_in_one_failed_manifest(moment: str):
    async def scenario() -> None:
        world = World()
        await world.send('{"id": "bad", "inputs": []}')
        world.watch(at(moment, Died))
        with pytest.raises(Died):
            await world.handle_next()
        world.watch(nothing)
        await world.handle_all()
        assert world.store.uris == {f"{PREFIX}bad/manifest.json"}
        await assert_all_gone(world)

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["not-json", "output-elsewhere"])
def test_redrive_leaves_what_nothing_can_be_made_of_to_the_queue(name: str):
    async def scenario() -> None:
        world = World(max_receive_count=2, dead_letter=False)
        await world.queue.send(MALFORMED[name].body)
        await world.handle_all()
        assert not world.store.uris
        assert await world.left() == 0
        (dead,) = await world.dead_letters.receive(10, 0)
        assert dead.body == MALFORMED[name].body

    asyncio.run(scenario())


def test_forbidden_output_is_never_written_to():
    async def scenario() -> None:
        world = World()
        message_id = await world.send(output={"uri": "s3://elsewhere/x/"})
        await world.handle_next()
        assert world.store.uris == {f"{DEAD}{message_id}.json"}
        letter = json.loads(world.store.text(f"{DEAD}{message_id}.json"))
        assert letter["error"]["code"] == "forbidden_output"
        assert not world.rows.computed

    asyncio.run(scenario())


def test_the_last_receive_writes_a_manifest_that_says_we_gave_up():
    async def scenario() -> None:
        world = World(max_receive_count=2)
        await world.send()

        async def broken(step: str) -> None:
            if step == "put results?":
                raise StoreUnavailable("disk on fire")

        world.watch(broken)
        await world.handle_next()
        assert not world.store.uris, "there is another try"
        await world.clock.advance(1000)
        await world.handle_next()
        manifest = world.manifest("j")
        assert manifest.status is Status.FAILED
        assert manifest.request_counts.failed == 3
        assert manifest.error is not None
        assert (manifest.error.code, manifest.error.retryable) == ("gave_up", True)
        assert "disk on fire" in manifest.error.message
        await world.clock.advance(1000)
        assert not await world.handle_next()
        assert (await world.dead_letters.describe()).messages == 1

        # Somebody redrives the message, and all is well.
        (dead,) = await world.dead_letters.receive(10, 0)
        await world.queue.send(dead.body)
        world.watch(nothing)
        await world.handle_all()
        assert_exactly_once(world, ["a", "b", "c"])

    asyncio.run(scenario())


def test_a_last_receive_that_cannot_even_say_so_is_given_back():
    async def scenario() -> None:
        world = World(max_receive_count=1)
        await world.send()

        async def broken(step: str) -> None:
            if step.startswith(("get", "put")):
                raise StoreUnavailable("all of it")

        world.watch(broken)
        await world.handle_next()
        assert len(world.queue.released) == 1

    asyncio.run(scenario())


def test_two_messages_with_one_job_are_one_job():
    async def scenario() -> None:
        world = World()
        await world.send()
        await world.send()
        await world.handle_all()
        assert_exactly_once(world, ["a", "b", "c"])
        assert (world.counted("committed"), world.counted("duplicate")) == (1, 1)
        assert len(world.rows.computed) == 3
        await assert_all_gone(world)

    asyncio.run(scenario())


def test_two_deliveries_of_one_job_at_the_same_time_commit_once():
    async def scenario() -> None:
        world = World()
        world.rows = row_runner(world, AnsweringBridge())
        for _ in range(5):
            await world.send()
        async with world.keeper() as keeper:
            leases = [keeper.open(delivery) for delivery in await world.queue.receive(10, 0)]
            await asyncio.gather(*(world.runner.handle(lease) for lease in leases))
        assert (world.counted("committed"), world.counted("duplicate")) == (1, 4)
        assert len(world.results("j")) == 3
        assert world.metrics.rows.labels("completed")._value.get() == 3
        await assert_all_gone(world)

    asyncio.run(scenario())


def test_a_reused_id_becomes_a_dead_letter_and_the_first_job_stays_as_it_is():
    async def scenario() -> None:
        world = World()
        await world.send()
        await world.handle_next()
        message_id = await world.send(body_of(inputs=["else"]))
        await world.handle_next()
        assert len(world.store.uris) == 3
        assert [line["generated_text"] for line in world.results("j")] == ["A", "B", "C"]
        letter = json.loads(world.store.text(f"{DEAD}{message_id}.json"))
        assert letter["error"]["code"] == "job_id_reused"
        await assert_all_gone(world)

    asyncio.run(scenario())


def test_rows_not_started_within_the_ttl_expire_each_with_a_line():
    async def scenario() -> None:
        world = World()
        world.rows = row_runner(world, AnsweringBridge())
        await world.send(ttl_seconds=60)
        await world.clock.advance(61)
        await world.handle_next()
        lines = world.results("j")
        assert [line["error"]["code"] for line in lines] == ["expired"] * 3
        assert world.manifest("j").status is Status.EXPIRED
        assert world.metrics.rows.labels("expired")._value.get() == 3
        await assert_all_gone(world)

    asyncio.run(scenario())


def test_rows_within_the_ttl_run():
    async def scenario() -> None:
        world = World()
        world.rows = row_runner(world, AnsweringBridge())
        await world.send(ttl_seconds=60)
        await world.clock.advance(59)
        await world.handle_next()
        assert world.manifest("j").status is Status.COMPLETED

    asyncio.run(scenario())


def test_a_row_that_fails_is_a_line_in_its_place():
    async def scenario() -> None:
        world = World()
        world.rows = row_runner(world, AnsweringBridge())
        inputs = ["a", 5, {"input": "c", "adapter": "none"}, {"input": "d", "parameters": {"typo": 1}}, "e"]
        await world.send(inputs=inputs)
        await world.handle_next()
        lines = world.results("j")
        codes = [line["error"] and line["error"]["code"] for line in lines]
        assert codes == [None, "invalid_line", "adapter_not_found", "invalid_parameters", None]
        assert [line["index"] for line in lines] == list(range(5))
        assert world.manifest("j").status is Status.COMPLETED_WITH_ERRORS

    asyncio.run(scenario())


def test_sampled_rows_get_a_seed_that_a_second_attempt_repeats():
    async def seeds() -> list[int | None]:
        world, bridge = World(), HangingBridge()
        runner = row_runner(world, bridge)
        job = make_job(inputs=["x", "x"], parameters={"do_sample": True})
        running = asyncio.create_task(run_rows(runner, job))
        await until(lambda: len(bridge.requests) == 2)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return sorted(request.params.seed for request in bridge.requests.values())

    first = asyncio.run(seeds())
    assert first == asyncio.run(seeds())
    assert len({None, *first}) == 3


def test_every_ending_of_a_lease_is_counted_once():
    async def scenario() -> None:
        world = World()
        for body in [body_of(), body_of(), "no json", '{"inputs": []}']:
            await world.send(body)
        while await world.handle_next():
            pass
        outcomes = {name: world.counted(name) for name in ("committed", "duplicate", "dead_letter", "failed")}
        assert outcomes == dict.fromkeys(outcomes, 1)

    asyncio.run(scenario())


def test_ack_that_finds_the_lease_lost_counts_as_lost():
    async def scenario() -> None:
        world = World()
        await world.send()
        world.watch(at("delete?", lambda: LeaseLost("stale")))
        await world.handle_next()
        assert world.counted("lost") == 1
        assert world.counted("committed") == 0

    asyncio.run(scenario())
