"""What handlers' adapters leave on the disk: a book with one writer, and copies as long as they are used."""

import asyncio
import json
import os
import shutil
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from prometheus_client import CollectorRegistry

from tests.custom.conftest import MODELS, ask, handler_of
from tests.custom.test_adapters import adapters_of, put
from tests.glue.registering import Client
from worker.custom.adapters import HandlerAdapters
from worker.errors import (
    HandlerRefused,
    InvalidRegistration,
    ObjectNotFound,
    RegistryUnavailable,
    StorageFull,
    StoreRefused,
    StoreUnavailable,
)
from worker.http.adapters_api import ALIAS_HEADER, AdaptersApi
from worker.http.server import Apis, serving

BOOK = Path("kept", "handler-registrations.json")
COPIES = Path("kept", "handler-adapters")


class Bucket:
    """In the place of S3: what lies under every prefix is its `version`."""

    def __init__(self) -> None:
        self.version = "1" * 64
        self.error: Exception | None = None

    async def fetch(self, uri: str, folder: Path) -> str:
        await asyncio.to_thread(folder.mkdir, parents=True)
        if self.error is not None:
            raise self.error
        await asyncio.to_thread((folder / "adapter.txt").write_text, uri)
        return self.version


@asynccontextmanager
async def worker_of(tmp_path: Path, bucket: Bucket, model: Path = MODELS / "adaptecho"):
    """A worker's adapters; two at once have one CACHE_DIR."""
    async with handler_of(model) as handler:
        adapters = HandlerAdapters(
            handler, tmp_path / "adapters", tmp_path / "kept" / "adapters", bucket.fetch
        )
        await adapters.start()
        try:
            yield handler, adapters
        finally:
            adapters.close()


def copies(tmp_path: Path) -> set[str]:
    return {str(path.relative_to(tmp_path / COPIES)) for path in (tmp_path / COPIES).glob("*/*")}


@pytest.mark.parametrize("content", [b'{"registrations":[{"name":"\xff"}]}', b"{", b'{"registrations": 1}'])
def test_a_damaged_book_costs_the_changes_alone_and_stays_as_it_is(tmp_path, caplog, content: bytes) -> None:
    put(tmp_path, "one")
    (tmp_path / BOOK).parent.mkdir()
    (tmp_path / BOOK).write_bytes(content)

    async def play():
        async with adapters_of(tmp_path) as (handler, adapters):
            assert (await ask(handler, b"x", adapter="one")).body == b"onex"
            with pytest.raises(RegistryUnavailable, match=r"handler-registrations\.json cannot be read"):
                await adapters.register("two", "anywhere")

    asyncio.run(play())
    assert (tmp_path / BOOK).read_bytes() == content
    assert "registered adapters cannot be changed" in caplog.messages


def test_of_two_workers_one_registers_and_the_other_goes_on_from_there(tmp_path) -> None:
    async def play():
        bucket = Bucket()
        async with worker_of(tmp_path, bucket) as (_, first):
            await first.register("a", "s3://bucket/a/")
            await first.register("b", "x")
            async with worker_of(tmp_path, bucket) as (handler, second):
                assert (await ask(handler, b"x", adapter="a")).body == b"ax"
                for change in (second.register("c", "x"), second.update("a", pin=True), second.delete("b")):
                    with pytest.raises(RegistryUnavailable, match="another worker on this machine"):
                        await change
                await first.delete("b")
                await first.update("a", options={"echooption": "+"})
                assert copies(tmp_path) == {f"a/{bucket.version}"}
                first.close()
                await second.register("c", "x")
                texts = [(await ask(handler, b"x", adapter=name)).body for name in "abc"]
        return texts, {one["name"] for one in json.loads((tmp_path / BOOK).read_bytes())["registrations"]}

    assert asyncio.run(play()) == ([b"a+x", b"dynbx", b"cx"], {"a", "c"})


@pytest.mark.parametrize(
    ("raised", "answer"),
    [
        (ObjectNotFound("s3://bucket/a/"), InvalidRegistration),
        (StoreRefused("access denied"), InvalidRegistration),
        (InvalidRegistration("nothing in S3"), InvalidRegistration),
        (StoreUnavailable("slow down"), RegistryUnavailable),
        (OSError(28, "No space left on device"), StorageFull),
    ],
)
def test_a_source_that_cannot_be_had_is_told_as_what_it_is(tmp_path, raised, answer) -> None:
    async def play():
        bucket = Bucket()
        bucket.error = raised
        async with worker_of(tmp_path, bucket) as (_, adapters):
            with pytest.raises(
                answer, match=r"there is no s3|access denied|nothing in S3|slow down|No space left"
            ):
                await adapters.register("a", "s3://bucket/a/")
            assert await adapters.page(0, 9) == ([], None)

    asyncio.run(play())
    assert copies(tmp_path) == set()


def test_a_copy_stays_as_long_as_the_handler_is_told_of_it(tmp_path) -> None:
    async def play():
        bucket = Bucket()
        async with worker_of(tmp_path, bucket) as (_, adapters):
            await adapters.register("a", "s3://bucket/a/")
            bucket.version = "2" * 64
            with pytest.raises(HandlerRefused):
                await adapters.update("a", src="s3://bucket/a/", options={"error": "1"})
            assert copies(tmp_path) == {"a/" + "1" * 64}
            await adapters.update("a", src="s3://bucket/a/")
            assert copies(tmp_path) == {"a/" + "2" * 64}
            await adapters.delete("a")
            assert copies(tmp_path) == set()

    asyncio.run(play())


def test_a_change_that_cannot_be_kept_is_taken_back_from_the_handler(tmp_path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    async def play():
        async with worker_of(tmp_path, Bucket()) as (handler, adapters):
            await adapters.register("a", "x", options={"echooption": "1"})
            with monkeypatch.context() as patch:
                patch.setattr("worker.adapters.registrations.replace_file", full)
                for change in (
                    adapters.register("b", "x"),
                    adapters.update("a", options={"echooption": "2"}),
                    adapters.delete("a"),
                ):
                    with pytest.raises(StorageFull, match="No space left"):
                        await change
            return [(await ask(handler, b"x", adapter=name)).body for name in "ab"]

    assert asyncio.run(play()) == [b"a1x", b"dynbx"]


def test_a_bad_folder_is_told_of_and_blinds_nobody_to_the_others(tmp_path, caplog) -> None:
    put(tmp_path, "good")
    folder = put(tmp_path, "odd")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")  # nobody writes to it: it must not be read
    put(tmp_path, "no name")
    (tmp_path / "adapters" / "nowhere").symlink_to("gone")

    async def play():
        async with adapters_of(tmp_path) as (handler, adapters):
            await adapters.refresh()
            texts = [(await ask(handler, b"x", adapter=name)).body for name in ("good", "odd", "no name")]
            notes = {one.name: one.note for one in (await adapters.page(0, 9))[0]}
            with pytest.raises(InvalidRegistration, match="does not match"):
                await adapters.update("no name", pin=True)
            shutil.rmtree(tmp_path / "adapters" / "no name")
            await adapters.refresh()
            return texts, notes, adapters.trouble("no name")

    texts, notes, trouble = asyncio.run(play())
    assert texts == [b"goodx", b"oddx", b"dynno namex"]
    assert (notes.pop("good"), notes.pop("odd")) == (None, None)
    assert "does not match" in notes["no name"]
    assert "No such file" in notes["nowhere"]
    assert trouble is None
    told = [record for record in caplog.records if record.message == "an adapter cannot be used"]
    assert sorted(record.adapter for record in told) == ["no name", "nowhere"]


def test_a_version_is_of_the_content_and_of_all_of_it(tmp_path) -> None:
    folder = put(tmp_path, "one")
    version = "a" * 64
    published = tmp_path / ".versions" / "two" / version
    published.mkdir(parents=True)
    (tmp_path / "adapters" / "two").symlink_to(f"../.versions/two/{version}")

    async def play():
        async with adapters_of(tmp_path) as (_, adapters):
            first = adapters.version("one")
            os.utime(folder / "adapter.txt", (1, 1))
            await adapters.refresh()
            assert adapters.version("one") == first
            (folder / "code.py").write_text("x = 1")
            await adapters.refresh()
            assert adapters.version("one") not in {first, None}
            told = await adapters.describe("two")
            assert (told.version, told.src) == (version, str(published))

    asyncio.run(play())


def test_what_was_said_of_the_folders_adapters_is_said_again_after_a_restart(tmp_path) -> None:
    put(tmp_path, "one")

    async def first():
        async with worker_of(tmp_path, Bucket()) as (_, adapters):
            await adapters.update("one", pin=True, options={"echooption": "!"})
            put(tmp_path, "one", "another text")
            await adapters.refresh()

    async def second():
        async with worker_of(tmp_path, Bucket()) as (handler, adapters):
            told = await adapters.describe("one")
            return (await ask(handler, b"x", adapter="one")).body, told.pin, told.options

    asyncio.run(first())
    assert asyncio.run(second()) == (b"one!x", True, {"echooption": "!"})


def test_a_registered_one_is_tried_again_also_when_the_folder_has_its_name(tmp_path) -> None:
    async def play():
        async with worker_of(tmp_path, Bucket()) as (handler, adapters):
            await adapters.register("a", "x")
            put(tmp_path, "a")
            handler.on_lost("a", "not now", False)
            assert adapters.trouble("a") == "not now"
            await adapters.refresh()
            return adapters.trouble("a"), (await adapters.describe("a")).src

    assert asyncio.run(play()) == (None, "x")


_TELLS_ITS_ALIAS = """
from djl_python import Output

def register_adapter(inputs):
    return Output(message=f"{inputs.function_name} {inputs.get_property('alias')}")

update_adapter = unregister_adapter = register_adapter

def handle(inputs):
    return None
"""


def test_the_alias_of_the_header_reaches_the_handler_and_is_kept(tmp_path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.py").write_text(_TELLS_ITS_ALIAS)

    @asynccontextmanager
    async def api_of(adapters):
        api = AdaptersApi("m", True, lambda: None)
        api.registry = adapters
        async with (
            serving("127.0.0.1", 0, CollectorRegistry(), lambda: None, apis=Apis(api)) as port,
            aiohttp.ClientSession() as session,
        ):
            yield Client(session, port)

    async def play():
        said = []
        for changes in (
            [("POST", "/adapters?name=a&src=x", "shown"), ("POST", "/adapters?name=b&src=x", None)],
            [("POST", "/adapters/a/update?pin=1", None), ("POST", "/adapters/b/update", "late")],
            [("DELETE", "/adapters/a", None), ("DELETE", "/adapters/b", "last")],
        ):
            async with worker_of(tmp_path, Bucket(), model) as (_, adapters), api_of(adapters) as client:
                for method, target, alias in changes:
                    headers = None if alias is None else {ALIAS_HEADER: alias}
                    said.append((await client(method, target, headers=headers)).body["status"])
        return said

    assert asyncio.run(play()) == [
        "register_adapter shown",
        "register_adapter b",
        "update_adapter shown",
        "update_adapter late",
        "unregister_adapter shown",
        "unregister_adapter last",
    ]
