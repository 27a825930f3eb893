"""Jobs whose rows lie in an object: split once, each part committed once, one manifest, whatever dies."""

import asyncio
import gzip
import hashlib
import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from tests.glue.support import DEAD, PREFIX, Died, World, make_job, nothing
from tests.glue.test_runner import at
from worker import wire
from worker.errors import QueueUnavailable, StoreRefused, StoreUnavailable
from worker.jobs import Output, Row
from worker.sender.follow import cancel
from worker.transport.lines import MAX_LINE_BYTES
from worker.wire.manifest import Status

URI = "s3://in/rows.jsonl"
TEXTS = [f"row {number}" for number in range(11)]
OUTPUT = Output(PREFIX)


def body(uri: str = URI, **fields: Any) -> str:
    return json.dumps({"id": "j", "input": {"uri": uri}} | fields)


async def put_rows(world: World, texts: list[str] = TEXTS, uri: str = URI) -> None:
    data = b"".join(json.dumps({"input": text}).encode() + b"\n\n" for text in texts)
    await world.store.put(uri, gzip.compress(data) if uri.endswith(".gz") else data)


def lines(world: World) -> list[dict[str, Any]]:
    """Of all parts in the manifest's order, each of which must be what the manifest says."""
    found = []
    for output in world.manifest("j").outputs:
        text = world.store.text(output.uri)
        assert output.sha256 == hashlib.sha256(text.encode()).hexdigest()
        assert output.rows == len(text.splitlines())
        found += [json.loads(line) for line in text.splitlines()]
    return found


def assert_every_row_once(world: World, texts: list[str] = TEXTS, parts: int = 3) -> None:
    assert [(line["index"], line["id"], line["generated_text"]) for line in lines(world)] == [
        (index, str(index), text.upper()) for index, text in enumerate(texts)
    ]
    manifest = world.manifest("j")
    assert manifest.status is Status.COMPLETED
    assert manifest.request_counts.total == len(texts)
    assert len(manifest.outputs) == parts
    assert manifest.input is not None


@pytest.mark.parametrize("uri", [URI, "s3://in/rows.jsonl.gz"])
def test_a_large_input_is_split_and_every_row_is_committed_once(uri):
    async def scenario() -> None:
        world = World()
        await put_rows(world, uri=uri)
        await world.send(body(uri))
        assert await world.handle_next()
        assert world.counted("split") == 1
        assert await world.left() == 3, "the parts, and no longer the job"
        await world.handle_all()
        assert_every_row_once(world)
        assert sorted(world.rows.computed) == sorted(f"j/{number}" for number in range(11))
        manifest, stored = world.manifest("j"), await world.store.head(uri)
        assert (manifest.input.uri, manifest.input.etag) == (uri, stored.etag)
        assert world.counted("committed") == 3
        assert world.metrics.rows.labels("completed")._value.get() == 11
        assert await world.left() == 0

    asyncio.run(scenario())


def test_an_input_of_one_part_is_run_where_it_was_received():
    async def scenario() -> None:
        world = World()
        await put_rows(world, TEXTS[:4])
        await world.send(body())
        assert await world.handle_next()
        assert await world.left() == 0
        assert_every_row_once(world, TEXTS[:4], parts=1)
        assert {uri.rpartition("/")[2] for uri in world.store.uris if uri.startswith(PREFIX)} == {
            "parts.json",
            "results-00000-of-00001.jsonl",
            "manifest.json",
        }

    asyncio.run(scenario())


def test_only_the_lines_that_begin_in_a_range_are_run():
    async def scenario() -> None:
        world = World()
        await put_rows(world)
        line = len(json.dumps({"input": TEXTS[0]})) + 2
        await world.send(body(input={"uri": URI, "range": [line, line * 7]}))
        await world.handle_all()
        assert [line["generated_text"] for line in lines(world)] == [text.upper() for text in TEXTS[1:8]]

    asyncio.run(scenario())


async def _moments(prepare: Callable[[World], Any]) -> list[str]:
    """Every step that handling all messages takes, before and after."""
    world, seen = World(), list[str]()

    async def note(step: str) -> None:
        seen.append(step)

    await prepare(world)
    world.watch(note)
    await world.handle_all()
    return seen


async def _sent(world: World) -> None:
    await put_rows(world)
    await world.send(body())


@pytest.mark.parametrize("occasion", [1, 2, 3])
@pytest.mark.parametrize("moment", sorted(set(asyncio.run(_moments(_sent)))))
@pytest.mark.parametrize("trouble", ["died", "trouble"])
def test_whatever_breaks_at_any_step_of_any_part_every_row_is_had_once(moment, occasion, trouble):
    """The `occasion`-th time that the step is taken: of the job itself, or of one of its parts."""

    async def scenario() -> None:
        world = World(max_receive_count=50)
        await _sent(world)
        times = 0

        async def hook(step: str) -> None:
            nonlocal times
            if step == moment:
                times += 1
                if times == occasion:
                    raise Died if trouble == "died" else _trouble(moment)

        world.watch(hook)
        for _ in range(40):
            try:
                if not await world.handle_next():
                    await world.clock.advance(1000)
            except Died:
                world.watch(nothing)
            if not await world.left():
                break
        assert await world.left() == 0
        assert_every_row_once(world)
        assert (await world.dead_letters.describe()).messages == 0

    asyncio.run(scenario())


def _trouble(moment: str) -> Exception:
    return QueueUnavailable("down") if moment.startswith("delete") else StoreUnavailable("down")


def test_a_job_split_twice_is_split_as_the_first_time_and_done_once():
    """The first attempt died after some parts were sent, and the settings have changed since."""

    async def scenario() -> None:
        world = World()
        await _sent(world)
        world.watch(at("delete?", Died))
        with pytest.raises(Died):
            await world.handle_next()
        world.watch(nothing)
        assert await world.left() == 4, "three parts and the job"
        assert await world.handle_next()
        world.rows_per_part = 2
        await world.handle_all()
        assert_every_row_once(world)
        assert len(world.rows.computed) == 11, "what is committed is not computed again"

    asyncio.run(scenario())


def test_parts_that_are_committed_are_not_sent_again():
    async def scenario() -> None:
        world = World()
        await _sent(world)
        world.watch(at("delete?", lambda: StoreUnavailable("down")))
        assert await world.handle_next()
        world.watch(nothing)
        assert await world.handle_next()
        assert await world.handle_next()
        await world.clock.advance(1000)
        assert await world.left() == 2, "a part, and the job that was not deleted"
        sent = []
        send_all = world.queue.send_all

        async def watched(messages: Any) -> None:
            sent.extend(json.loads(one.body)["part"] for one in messages)
            await send_all(messages)

        world.queue.send_all = watched
        await world.handle_all()
        assert sent in ([], [2])
        assert_every_row_once(world)

    asyncio.run(scenario())


def test_the_last_two_parts_at_the_same_time_make_one_manifest():
    async def scenario() -> None:
        world = World()
        await _sent(world)
        assert await world.handle_next()
        async with world.keeper() as keeper:
            leases = [keeper.open(delivery) for delivery in await world.queue.receive(10, 0)]
            assert len(leases) == 3
            await asyncio.gather(*(world.runner.handle(lease) for lease in leases))
        assert_every_row_once(world)
        assert await world.left() == 0

    asyncio.run(scenario())


def test_a_part_that_comes_after_the_manifest_is_a_duplicate():
    async def scenario() -> None:
        world = World()
        await _sent(world)
        assert await world.handle_next()
        parts = await world.queue.receive(10, 0)
        for part in parts:
            await world.queue.release(part.receipt, 0)
            await world.queue.send(part.body)
        await world.handle_all()
        assert_every_row_once(world)
        assert world.counted("duplicate") == 3
        assert len(world.rows.computed) == 11

    asyncio.run(scenario())


def test_an_input_that_is_replaced_after_the_split_fails_the_job():
    async def scenario() -> None:
        world = World()
        await _sent(world)
        assert await world.handle_next()
        assert await world.handle_next()
        await put_rows(world, ["else"] * 11)
        await world.handle_all()
        manifest = world.manifest("j")
        assert manifest.status is Status.FAILED
        assert (manifest.error.code, manifest.error.retryable) == ("invalid_input", False)
        assert "has the ETag" in manifest.error.message
        assert await world.left() == 0
        assert not any(uri.startswith(DEAD) for uri in world.store.uris)
        assert world.counted("failed") == 1
        assert world.counted("duplicate") == 1, "the other part need not be tried"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("data", "uri", "says"),
    [
        (None, URI, "s3://in/rows.jsonl does not exist"),
        (b"", URI, "s3://in/rows.jsonl has no rows"),
        (b"\n \n", URI, "s3://in/rows.jsonl has no rows"),
        (b"not packed", "s3://in/x.gz", "s3://in/x.gz is no whole gzip file"),
        (gzip.compress(b"{}\n" * 1000)[:-9], "s3://in/x.gz", "s3://in/x.gz is no whole gzip file"),
    ],
)
def test_an_input_that_is_no_input_fails_the_job_with_its_reason(data, uri, says):
    async def scenario() -> None:
        world = World()
        if data is not None:
            await world.store.put(uri, data)
        await world.send(body(uri))
        await world.handle_all()
        manifest = world.manifest("j")
        assert manifest.error.code == "invalid_input"
        assert says in manifest.error.message
        assert await world.left() == 0

    asyncio.run(scenario())


def test_an_id_used_for_another_file_is_refused_and_the_first_job_stays():
    async def scenario() -> None:
        world = World()
        await _sent(world)
        await world.handle_all()
        before = world.store.text(f"{PREFIX}j/manifest.json")
        await put_rows(world, ["else"] * 20)
        message_id = await world.send(body())
        await world.handle_all()
        assert world.store.text(f"{PREFIX}j/manifest.json") == before
        letter = json.loads(world.store.text(f"{DEAD}{message_id}.json"))
        assert letter["error"]["code"] == "job_id_reused"

    asyncio.run(scenario())


def test_the_same_file_sent_again_is_a_duplicate():
    async def scenario() -> None:
        world = World()
        await _sent(world)
        await world.handle_all()
        await world.send(body())
        await world.handle_all()
        assert world.counted("duplicate") == 1
        assert_every_row_once(world)

    asyncio.run(scenario())


def test_a_job_that_is_done_may_lose_its_input_and_come_again():
    async def scenario() -> None:
        world = World()
        await _sent(world)
        await world.handle_all()
        del world.store._objects[URI]
        await world.send(body())
        await world.handle_all()
        assert world.counted("duplicate") == 1
        assert not any(uri.startswith(DEAD) for uri in world.store.uris)

    asyncio.run(scenario())


def test_bad_lines_are_error_lines_at_their_places():
    async def scenario() -> None:
        world = World()
        data = b'"a"\n{"input": 5}\nnot JSON\n"' + b"x" * MAX_LINE_BYTES + b'"\n"e"'
        await world.store.put(URI, data)
        await world.send(body())
        await world.handle_all()
        found = lines(world)
        assert [line["generated_text"] for line in found] == ["A", None, None, None, "E"]
        assert [line["error"] and line["error"]["code"] for line in found] == [
            None,
            *["invalid_line"] * 3,
            None,
        ]
        assert f"more than {MAX_LINE_BYTES} bytes" in found[3]["error"]["message"]
        assert world.manifest("j").status is Status.COMPLETED_WITH_ERRORS
        assert world.manifest("j").error_counts == {"invalid_line": 3}

    asyncio.run(scenario())


def test_what_the_message_says_holds_for_every_row_of_every_part():
    async def scenario() -> None:
        world = World()
        await put_rows(world)
        fields = {"adapters": "pirate", "parameters": {"typo": 1}, "metadata": {"team": "x"}}
        await world.queue.send(body(**fields), {"adapter": "robot"})
        await world.handle_all()
        found = lines(world)
        assert {line["adapter"] for line in found} == {"robot"}
        assert {line["error"]["code"] for line in found} == {"invalid_parameters"}
        assert world.manifest("j").metadata == {"team": "x"}

    asyncio.run(scenario())


def test_a_cancelled_large_job_has_a_line_for_every_row_it_did_not_start():
    async def scenario() -> None:
        from tests.glue.test_runner import AnsweringBridge, row_runner

        world = World()
        world.rows = row_runner(world, AnsweringBridge())
        await _sent(world)
        assert await world.handle_next()
        assert await world.handle_next()
        assert await cancel(world.store, OUTPUT, "j")
        await world.handle_all()
        found = lines(world)
        assert [line["index"] for line in found] == list(range(11))
        assert [line["error"] is not None for line in found] == [False] * 4 + [True] * 7
        assert world.manifest("j").status is Status.CANCELLED

    asyncio.run(scenario())


def test_the_last_receive_of_a_part_says_that_the_job_was_given_up_and_success_replaces_it():
    async def scenario() -> None:
        world = World(max_receive_count=2)
        await _sent(world)
        assert await world.handle_next()
        world.watch(at("run?", lambda: StoreUnavailable("down")))
        assert await world.handle_next()
        await world.clock.advance(1000)
        world.watch(nothing)
        for _ in range(2):
            assert await world.handle_next()

        async def always(step: str) -> None:
            if step == "run?":
                raise StoreUnavailable("down")

        world.watch(always)
        await world.handle_all()
        assert world.manifest("j").error.code == "gave_up"
        world.watch(nothing)
        (dead,) = await world.dead_letters.receive(10, 0)
        await world.queue.send(dead.body)
        await world.handle_all()
        assert_every_row_once(world)

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["openai", "bedrock"])
def test_every_part_has_the_form_that_was_asked_for(name):
    async def scenario() -> None:
        world = World()
        await put_rows(world)
        await world.send(body(output={"uri": PREFIX, "format": name}))
        await world.handle_all()
        found = lines(world)
        assert len(found) == 11
        assert {"custom_id" in line for line in found} == {name == "openai"}
        assert {"recordId" in line for line in found} == {name == "bedrock"}
        if name == "bedrock":
            summary = json.loads(world.store.text(f"{PREFIX}j/manifest.json.out"))
            assert summary["totalRecordCount"] == 11

    asyncio.run(scenario())


def test_parts_are_in_the_group_of_their_job():
    async def scenario() -> None:
        for group in ("tenant", None):
            world = World()
            await put_rows(world)
            await world.queue.send(body(), group_id=group)
            assert await world.handle_next()
            parts = await world.queue.receive(10, 0)
            assert {part.group_id for part in parts} == {group or "j"}
            assert (
                len({wire.decode(part, output_prefixes=[PREFIX], max_rows=1, now=0).digest for part in parts})
                == 1
            )

    asyncio.run(scenario())


def test_results_of_a_part_larger_than_memory_go_by_a_file():
    async def scenario() -> None:
        world = World()
        world.rows_per_part = 100
        texts = [f"{number} " + "x" * 30_000 for number in range(150)]
        await put_rows(world, texts)
        await world.send(body())
        await world.handle_all()
        assert_every_row_once(world, texts, parts=2)
        assert [uri.rpartition("/")[2] for uri in world.store.files] == [
            f"results-0000{part}-of-00002.jsonl" for part in range(2)
        ]

    asyncio.run(scenario())


def test_another_job_below_this_one_s_tallies_is_not_taken_for_its_parts():
    async def scenario() -> None:
        world = World()
        await put_rows(world)
        await world.send(body(id="tally-evil", output={"uri": f"{PREFIX}j/"}))
        await world.handle_all()
        assert any(uri.startswith(f"{PREFIX}j/tally-evil/tally-00000-of-00003") for uri in world.store.uris)
        await world.send(body())
        await world.handle_all()
        assert_every_row_once(world)

    asyncio.run(scenario())


@pytest.mark.parametrize("moment", ["delete?", "head rows.jsonl?", "put parts.json!"])
def test_a_job_given_up_before_its_parts_ran_is_done_when_it_comes_again(moment):
    async def scenario() -> None:
        world = World(max_receive_count=1)
        await _sent(world)
        world.watch(at(moment, lambda: StoreUnavailable("down")))
        assert await world.handle_next()
        assert world.manifest("j").error.code == "gave_up" if moment != "head rows.jsonl?" else True
        world.watch(nothing)
        await world.send(body())
        await world.handle_all()
        assert_every_row_once(world)
        assert not any(uri.startswith(DEAD) for uri in world.store.uris)

    asyncio.run(scenario())


def test_a_job_whose_input_is_replaced_between_its_split_and_its_parts_fails_with_a_manifest():
    async def scenario() -> None:
        world = World()
        await _sent(world)
        world.watch(at("put parts.json!", Died))
        with pytest.raises(Died):
            await world.handle_next()
        world.watch(nothing)
        await put_rows(world, ["else"] * 11)
        await world.handle_all()
        assert world.manifest("j").error.code == "invalid_input"
        assert await world.left() == 0
        assert not any(uri.startswith(DEAD) for uri in world.store.uris)

    asyncio.run(scenario())


def test_a_worker_that_may_not_read_gives_the_job_back_rather_than_fail_it():
    """Its credentials may be at fault, and another worker's good."""

    async def scenario() -> None:
        world = World()
        await _sent(world)
        world.watch(at("head rows.jsonl?", lambda: StoreRefused("Unable to locate credentials")))
        assert await world.handle_next()
        assert world.counted("released") == 1
        await world.handle_all()
        assert_every_row_once(world)

    asyncio.run(scenario())


def test_workers_with_other_settings_leave_one_set_of_results():
    async def scenario() -> None:
        world = World()
        world.rows_per_part = 100
        await _sent(world)
        world.watch(at("put manifest.json?", Died))
        with pytest.raises(Died):
            await world.handle_next()
        world.watch(nothing)
        world.rows_per_part = 4
        await world.handle_all()
        assert_every_row_once(world, parts=1)
        assert len(world.rows.computed) == 11

    asyncio.run(scenario())


def test_parts_that_nobody_split_never_make_a_job():
    async def scenario() -> None:
        world = World()
        await _sent(world)
        assert await world.handle_next()
        parts = [json.loads(one.body) for one in await world.queue.receive(10, 0)]
        del world.store._objects[f"{PREFIX}j/parts.json"]
        for part in parts:
            await world.queue.send(json.dumps(part))
        await world.handle_all()
        assert world.manifest("j").error.code == "invalid_input"

    asyncio.run(scenario())


def test_a_pointer_leads_nowhere_but_under_the_input_prefixes_and_what_it_leads_to_is_not_told():
    async def scenario() -> None:
        world = World()
        world.limits = msgspec.structs.replace(world.limits, input_prefixes=("s3://in/allowed/",))
        await world.store.put("s3://in/secret", b"password=hunter2")
        await world.store.put("s3://in/allowed/body", b"password=hunter3")
        for key in ("secret", "allowed/body"):
            pointer = ["x", {"s3BucketName": "in", "s3Key": key}]
            await world.queue.send(json.dumps(pointer), {"ExtendedPayloadSize": "9"})
        await world.handle_all()
        letters = [world.store.text(uri) for uri in world.store.uris if uri.startswith(DEAD)]
        reasons = {json.loads(letter)["error"]["code"] for letter in letters}
        assert reasons <= {"forbidden_input", "invalid_message"}
        assert not any("hunter" in letter for letter in letters)

    asyncio.run(scenario())


def test_a_body_larger_than_a_message_may_lie_in_the_store():
    async def scenario() -> None:
        world = World()
        await world.store.put("s3://in/body", json.dumps({"id": "j", "inputs": ["x" * 2_000_000]}).encode())
        pointer = json.dumps(["x", {"s3BucketName": "in", "s3Key": "body"}])
        await world.queue.send(pointer, {"ExtendedPayloadSize": "2000000"})
        await world.handle_all()
        assert world.manifest("j").status is Status.COMPLETED

    asyncio.run(scenario())


def test_an_error_of_ours_before_a_message_is_understood_ends_its_lease(monkeypatch):
    async def scenario() -> None:
        world = World()
        await world.send(body())
        monkeypatch.setattr(wire, "unwrap", lambda *_: 1 / 0)
        assert await world.handle_next()
        assert world.counted("released") == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("stalls", ["its source", "its first row"])
def test_a_large_job_that_stalls_lets_the_others_go_on(stalls):
    async def scenario() -> None:
        from tests.glue.test_runner import AnsweringBridge, row_runner

        world, never = World(), asyncio.Event()

        class Bridge(AnsweringBridge):
            async def submit(self, request, adapter=None, *_):
                if bytes(request.prompt) == b"slow":
                    await never.wait()
                return await super().submit(request, adapter)

        rows = row_runner(world, Bridge())

        async def run(texts: list[str], stop_after: int | None = None) -> None:
            rows_of_job = (Row(index=at, id=str(at), text=text) for at, text in enumerate(texts))
            job = msgspec.structs.replace(make_job(), rows=tuple(rows_of_job))

            async def source():
                for row in job.rows:
                    if row.index == stop_after:
                        await never.wait()
                    yield row

            async def emit(_: Any) -> None:
                await asyncio.sleep(0)

            with rows.hold() as hold:
                hold.take(job)
                await rows.run(hold, source(), lambda result: result, emit)

        stuck = run(["x"] * 2000, 3) if stalls == "its source" else run(["slow", *["x"] * 2000])
        stalled = asyncio.create_task(stuck)
        await asyncio.sleep(0.2)
        await asyncio.wait_for(run(["y"] * 50), 20)
        assert not stalled.done()
        stalled.cancel()
        await asyncio.gather(stalled, return_exceptions=True)

    asyncio.run(scenario())
