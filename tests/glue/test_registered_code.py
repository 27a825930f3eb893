"""The code of adapters that are registered: carried, loaded and unloaded, or told of."""

import asyncio
from pathlib import Path

import pytest

from adapters_sync.inventory import Limits
from tests.glue.registering import Scene
from worker.errors import HandlerRefused

CODE = Limits(rank=16, free_bytes=0, code=True)


class Recorder:
    """Whoever runs what adapters bring. `bad` is why it does not."""

    def __init__(self):
        self.said = []
        self.bad = None

    async def load(self, adapter):
        self.said.append(("load", adapter.name, (adapter.path / "model.py").read_text()))
        if self.bad:
            raise HandlerRefused(self.bad, 424)

    async def drop(self, name):
        self.said.append(("drop", name))

    def note(self, adapter):
        return None


def source(scene, name, code):
    src = scene.source(name)
    Path(src, "model.py").write_text(code)
    return src


def test_code_is_loaded_before_an_adapter_is_known_and_goes_with_it(tmp_path):
    async def play():
        scene, code = Scene(tmp_path, limits=CODE), Recorder()
        scene.registry._code = code
        src = source(scene, "a", "1")
        await scene.registry.register("a", src)
        first = scene.registry.find("a")
        source(scene, "a", "2")
        code.bad = "no"
        with pytest.raises(HandlerRefused):
            await scene.registry.update("a", src=src)
        assert scene.registry.find("a") == first
        with pytest.raises(HandlerRefused):
            await scene.registry.register("b", src)
        assert scene.registry.find("b") is None
        code.bad = None
        await scene.registry.update("a", src=src)
        assert scene.registry.find("a").version != first.version
        await scene.registry.update("a", pin=True)
        await scene.registry.delete("a")
        loads = [("load", "a", "1"), ("load", "a", "2"), ("load", "b", "2"), ("load", "a", "2")]
        assert code.said == [*loads, ("drop", "a")]

    asyncio.run(play())


def test_without_custom_code_nothing_is_carried_and_the_note_says_so(tmp_path, caplog):
    async def play():
        scene = Scene(tmp_path)
        src = source(scene, "a", "raise SystemExit")
        await scene.registry.register("a", src)
        assert not (scene.registry.find("a").path / "model.py").exists()
        note = "its model.py is not run: custom_code is off"
        assert (await scene.registry.describe("a")).note == note
        assert any(getattr(record, "reason", None) == note for record in caplog.records)
        again = Scene(tmp_path)
        await again.registry.start()
        assert (await again.registry.describe("a")).note == note
        await scene.registry.register("plain", scene.source("plain"))
        assert (await scene.registry.describe("plain")).note is None

    asyncio.run(play())
