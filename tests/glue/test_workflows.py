"""Workflows on a registry of adapters: registered whole or not at all, and there again after a restart."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.glue.registering import FakeLoader, Scene, run
from tests.glue.support import until
from worker.adapters.shelf import VersionShelf
from worker.errors import (
    AdapterTaken,
    InvalidRegistration,
    InvalidWorkflow,
    ModelNotFound,
    RegistrationError,
    RowError,
    StorageFull,
    UnknownWorkflow,
)
from worker.workflows.definition import Workflow, read_workflow
from worker.workflows.registry import Workflows

MODEL = "s3://bucket/llama/"


def workflow(name: str = "w", model: object = MODEL, **adapters: str) -> Workflow:
    """Of these adapters by key, one after the other."""
    value: Any = "in"
    for key in adapters:
        value = ["adapter", key, value]
    said = {
        "name": name,
        "models": {"m": model},
        "configs": {"adapters": {key: {"model": "m", "src": src} for key, src in adapters.items()}},
        "workflow": {"out": value if adapters else ["m", "in"]},
    }
    return read_workflow(json.dumps(said).encode())


class Place:
    """A worker's workflows; another on the same folder is that worker after a restart."""

    def __init__(self, root: Path, *, lora: bool = True) -> None:
        self.root = root
        self.scene = Scene(root, FakeLoader(places=8))
        adapters = self.scene.registry if lora else None
        self.workflows = Workflows(adapters, [MODEL], ["llama"], root / "workflows")

    async def restarted(self) -> "Place":
        self.scene.registry.close()
        place = Place(self.root)
        await place.scene.registry.start()
        await place.workflows.start()
        return place


@pytest.fixture
def play(tmp_path):
    def runner(scenario: Callable[[Place], Awaitable[None]], **options: Any) -> None:
        async def main() -> None:
            await scenario(Place(tmp_path, **options))

        run(main)

    return runner


def test_several_workflows_share_the_model_and_have_adapters_of_their_own(play):
    async def scenario(place):
        for name in ("one", "two"):
            await place.workflows.register(workflow(name, a=place.scene.source(name, fill=len(name))))
        assert place.workflows.names == ["one", "two"]
        assert await place.scene.names() == ["one.a", "two.a"]
        assert place.workflows.find("one").name == "one"

    play(scenario)


def test_what_a_workflow_calls_the_model_is_of_no_account(play):
    async def scenario(place):
        await place.workflows.register(workflow("one", MODEL.rstrip("/")))
        with pytest.raises(InvalidWorkflow, match=r"models\.m\.url is 's3://bucket/other/'; this worker"):
            await place.workflows.register(workflow("two", "s3://bucket/other/"))
        assert place.workflows.names == ["one"]

    play(scenario)


def test_another_version_of_the_model_is_another_model(play):
    async def scenario(place):
        await place.workflows.register(workflow("one", {"url": MODEL, "version": "1"}))
        await place.workflows.register(workflow("same", {"url": MODEL, "version": "1"}))
        await place.workflows.register(workflow("any"))
        with pytest.raises(InvalidWorkflow, match=r"version is '2'; this worker's is '1', as the workflow"):
            await place.workflows.register(workflow("two", {"url": MODEL, "version": "2"}))

    play(scenario)


def test_one_bad_adapter_fails_the_workflow_and_leaves_nothing_of_it(play):
    async def scenario(place):
        good = place.scene.source("good")
        place.scene.loader.bad["w.b"] = "it does not fit"
        with pytest.raises(RowError, match="it does not fit"):
            await place.workflows.register(workflow(a=good, b=place.scene.source("bad", fill=2)))
        with pytest.raises(InvalidRegistration):
            await place.workflows.register(workflow(a=good, b=str(place.root / "nowhere")))
        assert place.workflows.names == []
        assert await place.scene.names() == []
        with pytest.raises(ModelNotFound, match="The model w was not found"):
            place.workflows.find("w")
        await place.workflows.register(workflow(a=good))

    play(scenario)


def test_a_name_is_taken_once(play):
    async def scenario(place):
        await place.workflows.register(workflow(a=place.scene.source("a")))
        for name in ("w", "llama"):
            with pytest.raises(AdapterTaken, match=f"The workflow {name} is registered already"):
                await place.workflows.register(workflow(name))
        assert await place.scene.names() == ["w.a"]

    play(scenario)


def test_an_adapter_that_somebody_registered_by_that_name_is_not_taken_over(play):
    async def scenario(place):
        await place.scene.registry.register("w.a", place.scene.source("theirs", fill=3))
        before = place.scene.version("w.a")
        with pytest.raises(AdapterTaken):
            await place.workflows.register(workflow(a=place.scene.source("ours", fill=4)))
        assert place.scene.version("w.a") == before

    play(scenario)


def test_deleted_it_is_gone_with_its_adapters(play):
    async def scenario(place):
        await place.workflows.register(workflow(a=place.scene.source("a")))
        await place.workflows.delete("w")
        assert await place.scene.names() == []
        for gone in (place, await place.restarted()):
            with pytest.raises(UnknownWorkflow):
                gone.workflows.describe("w")
            with pytest.raises(UnknownWorkflow):
                await gone.workflows.delete("w")

    play(scenario)


def test_what_cannot_be_deleted_is_there_as_it_was_and_its_adapters_can_be_gone(play, monkeypatch):
    async def scenario(place):
        await place.workflows.register(workflow(a=place.scene.source("a")))
        book = VersionShelf.write

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        async def no_room(*_: object) -> None:
            raise StorageFull("the book cannot be written")

        monkeypatch.setattr(VersionShelf, "write", no_room)
        with pytest.raises(StorageFull, match="the book"):
            await place.workflows.delete("w")
        assert (place.workflows.names, await place.scene.names()) == (["w"], ["w.a"])
        monkeypatch.setattr(VersionShelf, "write", book)
        monkeypatch.setattr(Path, "unlink", full)
        with pytest.raises(StorageFull, match="The workflow w cannot be forgotten"):
            await place.workflows.delete("w")
        assert (place.workflows.names, await place.scene.names()) == (["w"], [])
        monkeypatch.undo()
        await place.workflows.delete("w")
        assert place.workflows.names == (await place.restarted()).workflows.names == []

    play(scenario)


def test_it_is_there_again_after_a_restart(play):
    async def scenario(place):
        asked = workflow(a=place.scene.source("a"), b=place.scene.source("b", fill=2))
        await place.workflows.register(asked)
        version = place.scene.version("w.a")
        again = await place.restarted()
        assert again.workflows.find("w") == asked
        assert again.scene.version("w.a") == version

    play(scenario)


def test_what_cannot_be_served_any_more_is_told_to_whoever_calls_it(play, tmp_path):
    async def scenario(place):
        await place.workflows.register(workflow(a=place.scene.source("a")))
        (tmp_path / "workflows" / "broken.json").write_text("{")
        place.scene.registry.close()
        elsewhere = Place(tmp_path)
        elsewhere.workflows = Workflows(elsewhere.scene.registry, ["s3://other/"], [], tmp_path / "workflows")
        await elsewhere.scene.registry.start()
        await elsewhere.workflows.start()
        assert elsewhere.workflows.names == []
        with pytest.raises(ModelNotFound, match=r"The workflow w cannot be served: models\.m\.url is"):
            elsewhere.workflows.find("w")
        with pytest.raises(ModelNotFound, match=r"The workflow broken cannot be served: .* cannot be read"):
            elsewhere.workflows.find("broken")

    play(scenario)


def test_replacing_changes_what_differs_and_nothing_else(play):
    async def scenario(place):
        first = workflow(a=place.scene.source("a"))
        await place.workflows.serve(first)
        loaded = len(place.scene.loader.loading)
        await place.workflows.serve(first)
        assert len(place.scene.loader.loading) == loaded
        await place.workflows.serve(workflow(b=place.scene.source("b", fill=2)))
        assert await place.scene.names() == ["w.b"]

    play(scenario)


def test_options_say_whether_an_adapter_is_loaded_and_stays(play):
    async def scenario(place):
        options = {"a": {"pin": True}, "b": {"preload": "false", "other": 1}}
        said = {
            "name": "w",
            "models": {"m": MODEL},
            "configs": {
                "adapters": {
                    key: {"model": "m", "src": place.scene.source(key, fill=len(one)), "options": one}
                    for key, one in options.items()
                }
            },
            "workflow": {"out": ["adapter", "a", ["adapter", "b", "in"]]},
        }
        await place.workflows.register(read_workflow(json.dumps(said).encode()))
        loaded, kept = place.scene.loader.memory, place.scene.loader.pinned
        assert [one.name for one in loaded] == [one.name for one in kept] == ["w.a"]
        told = await place.scene.registry.describe("w.b")
        assert (told.preload, told.pin, told.options) == (False, False, {"other": "1"})

    play(scenario)


def test_without_lora_a_workflow_of_the_model_alone_is_served(play):
    async def scenario(place):
        await place.workflows.register(workflow("plain"))
        with pytest.raises(InvalidWorkflow, match="LoRA is not enabled"):
            await place.workflows.register(workflow(a=place.scene.source("a")))

    play(scenario, lora=False)


def test_a_disk_that_takes_no_more_leaves_nothing(play, monkeypatch):
    async def scenario(place):
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("worker.workflows.registry.replace_file", full)
        with pytest.raises(StorageFull, match="The workflow w cannot be kept"):
            await place.workflows.register(workflow(a=place.scene.source("a")))
        assert await place.scene.names() == []

    play(scenario)


def test_a_caller_who_goes_leaves_nothing_half_done(play):
    async def scenario(place):
        source = place.scene.source("a")
        place.scene.loader.may_load.clear()
        task = asyncio.create_task(place.workflows.register(workflow(a=source)))
        await until(lambda: place.scene.loader.loading)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        place.scene.loader.may_load.set()
        assert place.workflows.names == []
        try:
            await place.workflows.register(workflow(a=source))
        except RegistrationError as error:
            pytest.fail(f"it cannot be registered now: {error}")

    play(scenario)


def test_an_adapter_that_was_changed_under_its_workflow_is_what_the_workflow_says_after_a_restart(play):
    async def scenario(place):
        first, second = place.scene.source("a"), place.scene.source("b", fill=2)
        await place.workflows.register(workflow(a=first))
        version = place.scene.version("w.a")
        await place.scene.registry.update("w.a", src=second)
        assert place.scene.version("w.a") != version
        again = await place.restarted()
        assert again.workflows.names == ["w"]
        assert again.scene.version("w.a") == version

    play(scenario)


def test_what_failed_at_a_restart_can_be_deleted_or_replaced(play, tmp_path):
    async def scenario(place):
        source = place.scene.source("a")
        for name in ("w", "v"):
            await place.workflows.register(workflow(name, a=source))
        place.scene.registry.close()
        moved = Place(tmp_path)
        moved.workflows = Workflows(moved.scene.registry, ["s3://moved/"], [], tmp_path / "workflows")
        await moved.scene.registry.start()
        await moved.workflows.start()
        assert sorted(moved.workflows.failed) == ["v", "w"]
        with pytest.raises(UnknownWorkflow, match="cannot be served"):
            moved.workflows.describe("w")
        assert moved.workflows.knows("w")
        await moved.workflows.delete("w")
        assert await moved.scene.names() == ["v.a"]
        await moved.workflows.serve(workflow("v", "s3://moved/", a=place.scene.source("b", fill=2)))
        assert (moved.workflows.names, moved.workflows.failed) == (["v"], {})

    play(scenario)


def test_two_workflows_whose_adapters_would_have_one_name_are_not_both_registered(play):
    async def scenario(place):
        source = place.scene.source("a")
        await place.workflows.register(workflow("a", **{"b.c": source}))
        with pytest.raises(AdapterTaken):
            await place.workflows.register(workflow("a.b", c=source))
        assert await place.scene.names() == ["a.b.c"]

    play(scenario)


def test_a_workflow_has_no_adapter_s_name(play):
    async def scenario(place):
        await place.scene.registry.register("theirs", place.scene.source("theirs"))
        place.scene.mirrored("mirrored", fill=2)
        for name in ("theirs", "mirrored"):
            with pytest.raises(AdapterTaken, match=f"An adapter is called {name}"):
                await place.workflows.register(workflow(name))

    play(scenario)
