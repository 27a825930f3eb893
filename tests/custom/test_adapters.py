"""Adapters that a handler is told of: from the folder, from S3, and again after a restart."""

import asyncio
import shutil
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.custom.conftest import MODELS, ask, handler_of
from worker.custom.adapters import HandlerAdapters
from worker.errors import (
    AdapterTaken,
    HandlerRefused,
    InvalidRegistration,
    RegistryUnavailable,
    StoreUnavailable,
    UnknownAdapter,
)

DIGEST = "d" * 64


async def fetch(uri: str, folder: Path) -> str:
    if "gone" in uri:
        raise StoreUnavailable(f"{uri}: no answer")
    await asyncio.to_thread(folder.mkdir, parents=True)
    await asyncio.to_thread((folder / "adapter.txt").write_text, uri)
    return DIGEST


@asynccontextmanager
async def adapters_of(tmp_path: Path, name: str = "adaptecho"):
    async with handler_of(MODELS / name) as handler:
        adapters = HandlerAdapters(handler, tmp_path / "adapters", tmp_path / "kept" / "adapters", fetch)
        await adapters.start()
        yield handler, adapters


def put(tmp_path: Path, name: str, text: str = "x") -> Path:
    folder = tmp_path / "adapters" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter.txt").write_text(text)
    return folder


def test_the_folder_is_followed(tmp_path: Path) -> None:
    put(tmp_path, "one")
    put(tmp_path, ".hidden")

    async def play():
        async with adapters_of(tmp_path) as (handler, adapters):
            assert (await ask(handler, b"x", adapter="one")).body == b"onex"
            before = adapters.version("one")
            put(tmp_path, "one", "changed in length")
            put(tmp_path, "two")
            await adapters.refresh()
            assert adapters.version("one") not in {before, None}
            assert (await ask(handler, b"x", adapter="two")).body == b"twox"
            shutil.rmtree(tmp_path / "adapters" / "one")
            await adapters.refresh()
            assert (await ask(handler, b"x", adapter="one")).body == b"dynonex"
            listed, following = await adapters.page(0, 1)
            assert ([one.name for one in listed], following) == (["two"], None)

    asyncio.run(play())


def test_one_that_the_handler_refuses_costs_nobody_else(tmp_path: Path) -> None:
    put(tmp_path, "one")

    async def play():
        async with adapters_of(tmp_path, "echo") as (handler, adapters):
            assert "no function register_adapter" in str((await adapters.describe("one")).note)
            with pytest.raises(HandlerRefused, match="no function register_adapter") as refused:
                await adapters.register("two", "anywhere")
            assert refused.value.status == 424
            assert (await ask(handler, b"fine")).body == b"fine"

    asyncio.run(play())


def test_what_is_registered_is_kept_and_told_again(tmp_path: Path) -> None:
    async def first():
        async with adapters_of(tmp_path) as (_, adapters):
            said = await adapters.register("s3", "s3://bucket/a/", options={"echooption": "-opt-"})
            assert said == "Adapter s3 registered"
            await adapters.register("local", "some/where", pin=True)
            await adapters.update("local", options={"echooption": "+"})
            await adapters.register("brief", "x")
            assert await adapters.delete("brief") == "Adapter brief unregistered"

    async def second():
        async with adapters_of(tmp_path) as (handler, adapters):
            found, _ = await adapters.page(0, 100)
            texts = [(await ask(handler, b"x", adapter=name)).body for name in ("s3", "local", "brief")]
            return found, texts

    asyncio.run(first())
    found, texts = asyncio.run(second())
    assert texts == [b"s3-opt-x", b"local+x", b"dynbriefx"]
    assert [(one.name, one.src, one.pin, one.version) for one in found] == [
        ("local", "some/where", True, None),
        ("s3", "s3://bucket/a/", False, DIGEST),
    ]


def test_the_copy_of_an_adapter_in_s3_is_what_the_handler_gets(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.py").write_text(
        "from pathlib import Path\n"
        "from djl_python import Output\n"
        "def handle(inputs):\n    return None\n"
        "def register_adapter(inputs):\n"
        "    assert inputs.get_as_string('src') == inputs.get_property('src')\n"
        "    assert (inputs.get_as_string('preload'), inputs.get_as_string('pin')) == ('true', 'false')\n"
        "    return Output(message=Path(inputs.get_property('src'), 'adapter.txt').read_text())\n"
    )

    async def play():
        async with handler_of(tmp_path / "model") as handler:
            adapters = HandlerAdapters(handler, tmp_path / "none", tmp_path / "kept" / "adapters", fetch)
            await adapters.start()
            return await adapters.register("a", "s3://bucket/a/"), await adapters.update("a", pin=False)

    with pytest.raises(HandlerRefused, match="no function update_adapter"):
        asyncio.run(play())


def test_a_change_that_fails_changes_nothing(tmp_path: Path) -> None:
    put(tmp_path, "ours")

    async def play():
        async with adapters_of(tmp_path) as (handler, adapters):
            await adapters.register("a", "x", options={"echooption": "1"})
            for name, src, options, error in [
                ("a", "y", {}, AdapterTaken),
                ("ours", "y", {}, AdapterTaken),
                ("b", "y", {"error": "1"}, HandlerRefused),
                ("b", "s3://gone/", {}, RegistryUnavailable),
                ("b", "https://host/b", {}, InvalidRegistration),
                ("../b", "y", {}, InvalidRegistration),
            ]:
                with pytest.raises(error):
                    await adapters.register(name, src, options=options)
            with pytest.raises(HandlerRefused) as starved:
                await adapters.update("a", options={"oom": "1"})
            assert starved.value.status == 507
            with pytest.raises(AdapterTaken):
                await adapters.delete("ours")
            with pytest.raises(AdapterTaken):
                await adapters.update("ours", src="elsewhere")
            for refused in (adapters.delete("b"), adapters.update("b"), adapters.describe("b")):
                with pytest.raises(UnknownAdapter):
                    await refused
            return (await ask(handler, b"x", adapter="a")).body, (await adapters.describe("a")).options

    assert asyncio.run(play()) == (b"a1x", {"echooption": "1"})


def test_what_a_new_process_did_not_take_is_in_trouble_until_it_does(tmp_path: Path) -> None:
    put(tmp_path, "one")

    async def play():
        async with adapters_of(tmp_path) as (handler, adapters):
            for ended, notes in ((False, None), (True, "it went wrong")):
                handler.on_lost("one", "it went wrong", ended)
                assert adapters.trouble("one") == "it went wrong"
                assert (await adapters.describe("one")).note is not None
                await adapters.refresh()
                assert adapters.trouble("one") == notes
            assert adapters.trouble("nobody") is None

    asyncio.run(play())
