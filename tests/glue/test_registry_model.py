"""Whatever a registry is asked for, in whatever order: it does it whole or not at all."""

import asyncio
import itertools
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters_sync.layout import resolve
from tests.glue.registering import FakeLoader, Scene
from tests.sync.builders import WEIGHTS, weights
from worker.errors import RegistrationError, RowError

NAMES = st.sampled_from(["a", "b", "c"])
FILLS = st.integers(0, 2)
MAYBE = st.sampled_from([None, True, False])

STEPS = st.one_of(
    st.tuples(st.just("register"), NAMES, FILLS, st.booleans(), st.booleans()),
    st.tuples(st.just("update"), NAMES, st.none() | FILLS, MAYBE, MAYBE),
    st.tuples(st.just("delete"), NAMES),
    st.tuples(st.just("upload"), NAMES, FILLS),
    st.tuples(st.just("remove"), NAMES),
    st.tuples(st.just("refuse"), NAMES),
    st.tuples(st.just("restart")),
    st.tuples(st.just("later")),
)


class Model:
    """What should be true: content and pin of every registered name; what the adapters folder holds."""

    def __init__(self, root: Path) -> None:
        self.scene = Scene(root, FakeLoader(places=8))
        self.registered: dict[str, tuple[int, bool]] = {}
        self.folder: set[str] = set()

    async def register(self, name: str, fill: int, preload: bool, pin: bool) -> None:
        src = self.scene.source(f"{name}{fill}", fill)
        loads = preload or pin
        await self.scene.registry.register(name, src, preload=preload, pin=pin)
        assert name not in self.registered
        assert name not in self.folder
        assert not (loads and name in self.scene.loader.bad)
        self.registered[name] = fill, pin

    async def update(self, name: str, fill: int | None, preload: bool | None, pin: bool | None) -> None:
        src = None if fill is None else self.scene.source(f"{name}{fill}", fill)
        await self.scene.registry.update(name, src=src, preload=preload, pin=pin)
        if name in self.registered:
            before, pinned = self.registered[name]
            self.registered[name] = before if fill is None else fill, pinned if pin is None else pin
        else:
            assert name in self.folder
            assert src is None

    async def delete(self, name: str) -> None:
        await self.scene.registry.delete(name)
        del self.registered[name]

    async def upload(self, name: str, fill: int) -> None:
        await self.remove(name)
        self.scene.mirrored(name, fill)
        self.folder.add(name)

    async def remove(self, name: str) -> None:
        shutil.rmtree(self.scene.folder / name, ignore_errors=True)
        self.folder.discard(name)

    async def refuse(self, name: str) -> None:
        """From now on the model cannot take the adapter, or it can again."""
        bad = self.scene.loader.bad
        if bad.pop(name, None) is None:
            bad[name] = "it does not fit"

    async def restart(self) -> None:
        self.scene.loader.bad.clear()
        self.scene = await self.scene.restarted(places=8)

    async def later(self) -> None:
        self.scene.time += 4000
        await self.scene.registry.refresh()

    async def check(self) -> None:
        registry, loader = self.scene.registry, self.scene.loader
        assert await self.scene.names() == sorted(self.registered.keys() | self.folder)
        for name in ("a", "b", "c"):
            found = registry.find(name)
            assert (found is not None) == (name in self.registered)
            if found is not None:
                fill, pin = self.registered[name]
                assert (found.path / WEIGHTS).read_bytes() == weights(fill)
                assert resolve(self.scene.place, name) == found
                told = await registry.describe(name)
                assert (told.version, told.pin) == (found.version, pin)
                pinned = {key.version for key in loader.pinned if key.name == name}
                assert pinned == ({found.version} if pin else set())
        assert not registry._coming
        assert not len(registry._turns)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(STEPS, max_size=14))
def test_every_history_leaves_what_was_asked_for(steps):
    async def history(root: Path) -> None:
        model = Model(root)
        for what, *arguments in steps:
            with suppress(RegistrationError, RowError):
                await getattr(model, what)(*arguments)
            await model.check()
        model.scene.registry.close()

    with tempfile.TemporaryDirectory() as root:
        asyncio.run(history(Path(root)))


class Cancelling:
    """Cancels `task` when it, or what it waits for, goes to another thread for the `at`-th time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.task: asyncio.Task[None] | None = None
        self.left = at
        run = asyncio.BaseEventLoop.run_in_executor

        def counted(loop: Any, *call: Any) -> Any:
            if self.task is not None:
                self.left -= 1
                if self.left == 0:
                    self.task.cancel()
            return run(loop, *call)

        monkeypatch.setattr(asyncio.BaseEventLoop, "run_in_executor", counted)


@pytest.mark.parametrize("update", [False, True])
def test_a_change_that_is_cancelled_anywhere_is_whole_or_undone(tmp_path, monkeypatch, update):
    async def history(root: Path, at: int) -> bool:
        model = Model(root)
        if update:
            await model.register("a", 1, True, True)
        cancelling = Cancelling(monkeypatch, at)
        work = model.scene.registry.update if update else model.scene.registry.register
        change = cancelling.task = asyncio.create_task(work("a", src=model.scene.source("a2", 2), pin=True))
        await asyncio.gather(change, return_exceptions=True)
        cancelling.task = None
        for restart in (False, True):  # cancelled while the book is written, it is there from then on
            scene = await model.scene.restarted() if restart else model.scene
            found = scene.registry.find("a")
            assert not update or found is not None
            if found is not None:
                assert (found.path / WEIGHTS).read_bytes() in {weights(1), weights(2)}
                assert resolve(scene.place, "a") == found
            assert {key.version for key in scene.loader.pinned} == ({found.version} if found else set())
        if found is not None:
            await scene.registry.delete("a")
        await scene.registry.register("a", scene.source("a0", 0))
        assert (scene.registry.find("a").path / WEIGHTS).read_bytes() == weights(0)
        scene.registry.close()
        return cancelling.left > 0

    for at in itertools.count(1):
        if asyncio.run(history(tmp_path / str(at), at)):
            break
    assert at > 8, "it hardly ever went to a thread"
