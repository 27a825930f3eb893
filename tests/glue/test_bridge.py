"""The bridge over a real engine, which is tiny."""

import asyncio
import shutil
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from adapters_sync.layout import AdapterFolder, resolve
from tests.glue.support import make_job, make_runner, run_rows, until
from worker.adapters.directory import AdapterDirectory
from worker.bridge import Bridge
from worker.core import Core, build_core
from worker.engine.engine import StepStats
from worker.errors import AdapterInvalid, AdapterStoreFull, EngineFailed, PromptTooLong, RowFailed
from worker.jobs import AdapterKey, Completion, Delta, InferenceRequest, SamplingParams
from worker.settings import read_settings

PROMPTS = ["one", "another", "a third, longer one"]
LONG = SamplingParams(max_new_tokens=100, ignore_eos=True)


def make_core(base: Path, **flags: Any) -> Core:
    """As `loramill worker` makes it, with less room for adapters than the tests use."""
    options = {"max_loras": 2, "max_cpu_loras": 3, "max_num_seqs": 4, "max_num_batched_tokens": 32} | flags
    return build_core(read_settings(environ={}, flags=options), str(base))


@pytest.fixture
def core(base: Path) -> Core:
    return make_core(base)


@pytest.fixture
def adapters(adapter_paths: list[Path]) -> list[AdapterFolder]:
    found = [resolve(path.parent, path.name) for path in adapter_paths]
    return [folder for folder in found if folder is not None]


def request(
    core: Core,
    name: str,
    text: str = "one",
    adapter: AdapterFolder | None = None,
    params: SamplingParams = SamplingParams(max_new_tokens=8),  # noqa: B008 (frozen)
    *,
    interactive: bool = False,
) -> InferenceRequest:
    key = None if adapter is None else AdapterKey(adapter.name, adapter.version)
    prompt = core.base.tokenizer.encode(text)
    return InferenceRequest(id=name, prompt=prompt, adapter=key, params=params, interactive=interactive)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 60))


def users(core: Core) -> int:
    return sum(entry.users for entry in core.store._entries.values())


def assert_all_free(core: Core) -> None:
    core.engine.check_integrity()
    assert not core.engine.has_work
    assert users(core) == 0


@contextmanager
def held_steps(core: Core, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The engine's thread waits in `step` until the event is set."""
    gate, step = threading.Event(), core.engine.step

    def held() -> tuple[list[Completion], StepStats]:
        assert gate.wait(30)
        return step()

    monkeypatch.setattr(core.engine, "step", held)
    try:
        yield gate
    finally:
        gate.set()


def test_more_adapters_than_fit_anywhere_complete_and_say_what_they_say_alone(core, adapters):
    every = [(text, adapter) for text in PROMPTS for adapter in [None, *adapters]]
    batched: list[StepStats] = []

    async def scenario() -> None:
        async with Bridge(core.engine, core.store, batched.append) as bridge:
            alone = [
                await bridge.submit(request(core, f"alone-{n}", text, adapter), adapter)
                for n, (text, adapter) in enumerate(every)
            ]
            together = await asyncio.gather(
                *(
                    bridge.submit(request(core, f"{again}-{n}", text, adapter), adapter)
                    for again in range(3)
                    for n, (text, adapter) in enumerate(every)
                )
            )
            texts = [completion.text for completion in alone]
            assert [completion.text for completion in together] == texts * 3
            assert len(set(texts)) > len(texts) // 2, "the adapters do not differ enough to tell"
            assert max(stats.rows for stats in batched) == 4
            assert max(stats.adapters for stats in batched) == 2
            assert core.store.stats().resident <= 3
            assert core.store.stats().evictions > 0
        assert_all_free(core)

    run(scenario)


def test_a_request_that_streams_tells_its_tokens_before_it_ends(core, adapters):
    async def scenario() -> None:
        async with Bridge(core.engine, core.store) as bridge:
            said: dict[str, list[Delta]] = {"a": [], "b": []}
            rows = [
                msgspec.structs.replace(request(core, name, "x", adapter), interactive=True, streams=True)
                for name, adapter in zip(said, [None, adapters[0]], strict=True)
            ]
            plain = bridge.submit(request(core, "plain", "x", adapters[1]), adapters[1])
            *done, _ = await asyncio.gather(
                bridge.submit(rows[0], None, said["a"].append),
                bridge.submit(rows[1], adapters[0], said["b"].append),
                plain,
            )
            for own, completion in zip(said.values(), done, strict=True):
                assert tuple(delta.token for delta in own) == completion.token_ids[:-1]
                assert completion.text.startswith("".join(delta.text for delta in own))
        assert_all_free(core)

    run(scenario)


def test_cancelled_requests_leave_the_engine_and_free_their_adapters(core, adapters, monkeypatch):
    async def scenario() -> None:
        async with Bridge(core.engine, core.store) as bridge:
            with held_steps(core, monkeypatch) as gate:
                tasks = [
                    asyncio.create_task(
                        bridge.submit(request(core, str(n), "x", adapter, params=LONG), adapter)
                    )
                    for n, adapter in enumerate([None, *adapters])
                ]
                # Three adapters have room; the others wait for it.
                await until(lambda: len(bridge._flights) == 4)
                for task in tasks:
                    task.cancel()
                outcomes = await asyncio.gather(*tasks, return_exceptions=True)
                assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
                gate.set()
                await until(lambda: users(core) == 0)
            after = await bridge.submit(request(core, "after", "x", adapters[5]), adapters[5])
            assert after.token_ids
        assert_all_free(core)

    run(scenario)


def test_one_cancelled_request_leaves_its_neighbours_alone(core, adapters):
    async def scenario() -> None:
        async with Bridge(core.engine, core.store) as bridge:
            alone = await bridge.submit(request(core, "alone", "x", adapters[0]), adapters[0])
            doomed = asyncio.create_task(
                bridge.submit(request(core, "doomed", "x", adapters[0], LONG), adapters[0])
            )
            kept = asyncio.create_task(
                bridge.submit(request(core, "kept", "x", adapters[0]), adapters[0]),
            )
            await until(lambda: len(bridge._flights) == 2)
            doomed.cancel()
            assert (await kept).text == alone.text
            await asyncio.gather(doomed, return_exceptions=True)
            await until(lambda: users(core) == 0)
        assert_all_free(core)

    run(scenario)


def test_an_invalid_adapter_fails_its_own_rows_alone(core, adapters, adapter_paths, tmp_path):
    broken_path = shutil.copytree(adapter_paths[0], tmp_path / "broken")
    weights = broken_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    broken = AdapterFolder("broken", "1", broken_path)
    gone = AdapterFolder("gone", "1", tmp_path / "gone")

    async def scenario() -> None:
        async with Bridge(core.engine, core.store) as bridge:
            outcomes = await asyncio.gather(
                *(
                    bridge.submit(request(core, str(n), "x", adapter), adapter)
                    for n, adapter in enumerate([broken, adapters[1], gone, None, broken])
                ),
                return_exceptions=True,
            )
            kinds = [type(outcome) for outcome in outcomes]
            assert kinds[0] is kinds[4] is AdapterInvalid
            assert kinds[1] is kinds[3] is Completion
            assert issubclass(kinds[2], AdapterInvalid | RowFailed)
        assert_all_free(core)

    run(scenario)


def test_a_request_that_can_never_run_is_refused_before_it_takes_anything(core, adapters):
    async def scenario() -> None:
        async with Bridge(core.engine, core.store) as bridge:
            with pytest.raises(PromptTooLong):
                await bridge.submit(request(core, "long", "x" * 500, adapters[0]), adapters[0])
        assert_all_free(core)
        assert core.store.stats().misses == 0

    run(scenario)


def test_a_broken_engine_tells_everybody(core, adapters, monkeypatch):
    async def scenario() -> None:
        started = threading.Event()

        def broken() -> Any:
            assert started.wait(30)
            raise ZeroDivisionError("bug")

        monkeypatch.setattr(core.engine, "step", broken)
        async with Bridge(core.engine, core.store) as bridge:
            waiting = asyncio.create_task(bridge.wait())
            submitted = [
                asyncio.create_task(bridge.submit(request(core, str(n), "x", adapter, params=LONG), adapter))
                for n, adapter in enumerate([None, *adapters])
            ]
            await until(lambda: len(bridge._flights) == 4)
            started.set()
            # Those who wait for room hear of it as well.
            outcomes = await asyncio.gather(waiting, *submitted, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [EngineFailed] * 8
            assert "ZeroDivisionError" in str(outcomes[0])
            assert isinstance(outcomes[0].__cause__, ZeroDivisionError)
            with pytest.raises(EngineFailed):
                await bridge.submit(request(core, "later", "x", adapters[0]), adapters[0])
            with pytest.raises(EngineFailed):
                await bridge.submit(request(core, "base-later"))
        assert users(core) == 0

    run(scenario)


def test_wait_returns_when_the_bridge_is_closed(core):
    async def scenario() -> None:
        async with Bridge(core.engine, core.store) as bridge:
            waiting = asyncio.create_task(bridge.wait())
        await waiting

    run(scenario)


def test_submit_after_the_end_is_refused(core, adapters):
    async def scenario() -> None:
        async with Bridge(core.engine, core.store) as bridge:
            pass
        with pytest.raises(EngineFailed):
            await bridge.submit(request(core, "late"))
        with pytest.raises(EngineFailed):
            await bridge.submit(request(core, "late", "x", adapters[0]), adapters[0])
        assert users(core) == 0

    run(scenario)


def test_closing_ends_every_request_in_flight(core, adapters):
    async def scenario() -> None:
        async with Bridge(core.engine, core.store) as bridge:
            tasks = [
                asyncio.create_task(bridge.submit(request(core, str(n), "x", adapter, LONG), adapter))
                for n, adapter in enumerate([None, *adapters[:3]])
            ]
            await until(lambda: len(bridge._flights) == 4)
        done, _ = await asyncio.wait(tasks, timeout=5)
        assert len(done) == 4, "whoever waits for an answer waits for ever"
        assert all(task.cancelled() or isinstance(task.exception(), EngineFailed) for task in done)
        assert users(core) == 0

    run(scenario)


def test_closing_ends_those_who_wait_for_room(core, adapters, monkeypatch):
    async def scenario() -> None:
        async with Bridge(core.engine, core.store) as bridge:
            tasks = [
                asyncio.create_task(bridge.submit(request(core, str(n), "x", adapter, LONG), adapter))
                for n, adapter in enumerate(adapters)
            ]
            await until(lambda: len(bridge._flights) == 3 and bridge.num_waiting_for_room == 3)
        _, waiting = await asyncio.wait(tasks, timeout=2)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert not waiting, "whoever waits for room waits for ever"

    run(scenario)


def test_a_job_whose_engine_goes_away_has_no_results_rather_than_fewer(core, tmp_path):
    """Fewer results than rows would be committed as if they were all."""

    async def scenario() -> None:
        async with Bridge(core.engine, core.store) as bridge:
            rows = make_runner(bridge, core.base.tokenizer, AdapterDirectory(tmp_path, 0.0), max_rows=4)
            job = make_job(inputs=["x"] * 6, parameters={"max_new_tokens": 100, "ignore_eos": True})
            running = asyncio.create_task(run_rows(rows, job))
            await until(lambda: len(bridge._flights) == 4)
        (outcome,) = await asyncio.gather(running, return_exceptions=True)
        assert isinstance(outcome, EngineFailed | asyncio.CancelledError), f"{len(outcome)} results of 6"

    run(scenario)


def test_steps_are_told_on_the_event_loop(core):
    threads: set[threading.Thread] = set()

    async def scenario() -> None:
        async with Bridge(
            core.engine, core.store, lambda _: threads.add(threading.current_thread())
        ) as bridge:
            await bridge.submit(request(core, "one"))
            await until(lambda: bool(threads))
        assert threads == {threading.main_thread()}

    run(scenario)


def test_rows_of_a_job_come_back_in_order_whoever_ends_first(core, adapters, adapter_paths):
    async def scenario() -> None:
        async with Bridge(core.engine, core.store) as bridge:
            directory = AdapterDirectory(adapter_paths[0].parent, 0.0)
            rows = make_runner(bridge, core.base.tokenizer, directory, max_rows=8)
            inputs = [
                {
                    "input": PROMPTS[n % 3],
                    "adapter": ["", "a1", "a4", "nobody"][n % 4],
                    "parameters": {"max_new_tokens": 1 + (17 * n) % 23, "details": n % 2 == 0},
                }
                for n in range(24)
            ]
            results = await run_rows(rows, make_job(inputs=inputs))
            assert [result.row.index for result in results] == list(range(24))
            versions = {folder.name: folder.version for folder in adapters}
            for result in results:
                name = result.row.adapter
                if name == "nobody":
                    assert result.failure is not None
                    assert result.failure.code == "adapter_not_found"
                else:
                    assert result.failure is None
                    assert result.adapter_version == versions.get(name or "")
                    assert (result.tokens is not None) == result.row.params.details
        assert_all_free(core)

    run(scenario)


def test_preloaded_adapter_is_in_memory_before_its_first_row(core, adapters):
    first = AdapterKey(adapters[0].name, adapters[0].version)

    async def scenario() -> None:
        async with Bridge(core.engine, core.store) as bridge:
            assert bridge.tier(first) == "disk"
            assert bridge.details(first) is None
            await bridge.preload(adapters[0])
            assert bridge.tier(first) == "cpu"
            await bridge.submit(request(core, "row", "x", adapters[0]), adapters[0])
            await until(lambda: users(core) == 0)
            assert bridge.tier(first) == "gpu"
            details = bridge.details(first)
            assert details is not None
            assert details.rank == core.store.loaded(first).rank
            assert bridge.requests(first) == 1
            assert details.num_bytes > 0
            assert core.store.stats().misses == 1
        assert_all_free(core)

    run(scenario)


def test_pinned_adapter_outlives_those_that_come_and_go(core, adapters):
    first = AdapterKey(adapters[0].name, adapters[0].version)

    async def scenario() -> None:
        async with Bridge(core.engine, core.store) as bridge:
            await bridge.preload(adapters[0], pin=True)
            for adapter in adapters[1:]:
                await bridge.submit(request(core, adapter.name, "x", adapter), adapter)
            assert core.store.loaded(first) is not None
            bridge.unpin(first)
            for adapter in adapters[1:4]:
                await bridge.submit(request(core, adapter.name, "x", adapter), adapter)
            assert core.store.loaded(first) is None
        assert_all_free(core)

    run(scenario)


def test_preload_says_why_it_cannot(core, adapters, adapter_paths, tmp_path):
    broken = shutil.copytree(adapter_paths[0], tmp_path / "broken")
    (broken / "adapter_config.json").write_text("[]")

    async def scenario() -> None:
        async with Bridge(core.engine, core.store) as bridge:
            with pytest.raises(AdapterInvalid, match="broken"):
                await bridge.preload(AdapterFolder("broken", "1", broken), pin=True)
            for adapter in adapters[:2]:
                await bridge.preload(adapter, pin=True)
            with pytest.raises(AdapterStoreFull, match="no place in host memory would be left"):
                await bridge.preload(adapters[2], pin=True)
            await bridge.submit(request(core, "row", "x", adapters[3]), adapters[3])
        with pytest.raises(EngineFailed):
            await bridge.preload(adapters[0])
        assert_all_free(core)

    run(scenario)


def test_preload_does_not_wait_for_room(core, adapters, monkeypatch):
    async def scenario() -> None:
        async with Bridge(core.engine, core.store) as bridge:
            with held_steps(core, monkeypatch):
                rows = [
                    asyncio.create_task(bridge.submit(request(core, str(n), "x", adapter), adapter))
                    for n, adapter in enumerate(adapters[:3])
                ]
                await until(lambda: len(bridge._flights) == 3)
                with pytest.raises(AdapterStoreFull, match="all of it is in use"):
                    await bridge.preload(adapters[3])
            await asyncio.gather(*rows)
        assert_all_free(core)

    run(scenario)


def test_every_row_that_ends_is_told_with_its_adapter(core, adapters):
    told: list[tuple[AdapterKey | None, int]] = []

    async def scenario() -> None:
        async with Bridge(
            core.engine, core.store, on_row=lambda key, done: told.append((key, len(done.token_ids)))
        ) as bridge:
            await bridge.submit(request(core, "base"))
            await bridge.submit(request(core, "row", "x", adapters[0]), adapters[0])

    run(scenario)
    assert [key for key, _ in told] == [None, AdapterKey(adapters[0].name, adapters[0].version)]
    assert all(count for _, count in told)


def test_row_that_waits_for_room_is_passed_so_often_and_no_more(core, adapters, monkeypatch):
    """A stream of rows for what is in memory must not keep an adapter out for ever."""

    async def scenario() -> None:
        async with Bridge(core.engine, core.store, max_passed_over=3) as bridge:

            async def row(name: str, adapter: AdapterFolder) -> None:
                await bridge.submit(request(core, name, "x", adapter), adapter)

            with held_steps(core, monkeypatch):
                tasks = [asyncio.create_task(row(str(n), adapters[n])) for n in range(3)]
                await until(lambda: len(bridge._flights) == 3)
                tasks.append(asyncio.create_task(row("waits", adapters[3])))
                await until(lambda: bridge.num_waiting_for_room == 1)
                tasks += [asyncio.create_task(row(f"later-{n}", adapters[n % 3])) for n in range(30)]
                await until(lambda: len(bridge._flights) == 3 + 3 and bridge.num_waiting_for_room == 28)
            await asyncio.gather(*tasks)
        assert_all_free(core)

    run(scenario)


def test_host_memory_full_of_the_queues_adapters_makes_room_for_an_interactive_row(core, adapters):
    """Every place is reserved by rows that are far from their end; they say what they would have said."""

    async def scenario() -> None:
        async with Bridge(core.engine, core.store) as bridge:
            alone = [
                (await bridge.submit(request(core, f"alone-{n}", "one", adapter, LONG), adapter)).text
                for n, adapter in enumerate(adapters)
            ]
            rows = [
                asyncio.create_task(bridge.submit(request(core, f"{n}", "one", adapter, LONG), adapter))
                for n, adapter in enumerate(adapters[:5])
            ]
            await until(lambda: users(core) == 3)
            call = request(core, "call", "one", adapters[5], LONG, interactive=True)
            assert (await bridge.submit(call, adapters[5])).text == alone[5]
            assert not all(row.done() for row in rows)
            assert [(await row).text for row in rows] == alone[:5]
            assert not bridge._displacing
        assert_all_free(core)

    run(scenario)


def test_rows_of_the_queue_end_under_endless_interactive_load(core, adapters):
    """They begin anew, again and again, until each is kept in its turn."""
    aborted: list[str] = []
    abort = core.engine.abort

    def counted(name: str) -> None:
        aborted.append(name)
        abort(name)

    core.engine.abort = counted  # type: ignore[method-assign]

    async def scenario() -> None:
        async with Bridge(core.engine, core.store) as bridge:
            rows = [
                asyncio.create_task(bridge.submit(request(core, f"{n}", "one", adapter, LONG), adapter))
                for n, adapter in enumerate(adapters[:3])
            ]
            await until(lambda: users(core) == 3)

            async def caller(number: int) -> None:
                turn = 0
                while not all(row.done() for row in rows):
                    adapter = adapters[3 + (number + turn) % 3]
                    call = request(core, f"call-{number}-{turn}", "one", adapter, interactive=True)
                    await bridge.submit(call, adapter)
                    turn += 1

            await asyncio.gather(*(caller(number) for number in range(3)), *rows)
            assert bridge._kept is None
        assert_all_free(core)

    run(scenario)
    assert max(aborted.count(name) for name in aborted) >= 3, "they were in each other's way"
