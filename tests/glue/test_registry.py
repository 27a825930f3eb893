"""Adapters that are registered while the worker runs: what they are, whose their names are, what survives."""

import asyncio
import json
import logging
import os
import shutil

import pytest

from adapters_sync.disk import exclusive
from adapters_sync.layout import MirrorPaths, resolve
from tests.glue.registering import Scene, run
from tests.glue.support import until
from tests.sync.builders import CONFIG, WEIGHTS, adapter_files, weights, write_folder
from worker.adapters.directory import AdapterDirectory
from worker.errors import (
    AdapterInvalid,
    AdapterStoreFull,
    AdapterTaken,
    InvalidRegistration,
    RegistryUnavailable,
    StorageFull,
    UnknownAdapter,
)


@pytest.fixture
def scene(tmp_path):
    return Scene(tmp_path)


def test_a_registered_folder_is_copied_so_that_what_runs_never_changes(scene):
    async def scenario():
        src = scene.source("a", fill=1)
        await scene.registry.register("a", src)
        found = scene.registry.find("a")
        (scene.root / "sources" / "a" / WEIGHTS).write_bytes(weights(2))
        assert (found.path / WEIGHTS).read_bytes() == weights(1)
        assert found.is_published
        assert scene.loader.names == {"a"}

    run(scenario)


def test_the_version_of_a_folder_is_the_one_that_the_layout_gives_it(scene):
    async def scenario():
        src = scene.source("a")
        write_folder(scene.root / "sources" / "a", {"deep/README.md": b"x", "code.py": b"not carried"})
        await scene.registry.register("other-name", src)
        assert scene.version("other-name") == resolve(scene.root / "sources", "a").version

    run(scenario)


@pytest.mark.parametrize("form", ["file://{}", "file://localhost{}", "{}/", "{}"])
def test_a_folder_is_named_by_a_path_or_a_url(scene, form):
    async def scenario():
        await scene.registry.register(
            "a", form.format(scene.source("with space")).replace(" ", "%20" if "file" in form else " ")
        )
        assert (await scene.registry.describe("a")).version == scene.version("a")

    run(scenario)


def test_an_adapter_that_is_not_to_be_preloaded_is_loaded_by_nobody(scene):
    async def scenario():
        await scene.registry.register("a", scene.source("a"), preload=False)
        assert scene.loader.loading == []
        info = await scene.registry.describe("a")
        assert (info.tier, info.preload, info.rank, info.bytes, info.requests) == (
            "disk",
            False,
            4,
            None,
            0,
        )
        assert scene.version("a")

    run(scenario)


def test_what_is_pinned_is_loaded_whatever_preload_says(scene):
    async def scenario():
        await scene.registry.register("a", scene.source("a"), preload=False, pin=True)
        assert {key.name for key in scene.loader.pinned} == {"a"}

    run(scenario)


def test_pins_come_and_go_by_update(scene):
    async def scenario():
        registry, loader = scene.registry, scene.loader
        await registry.register("a", scene.source("a"))
        assert not loader.pinned
        await registry.update("a", pin=True)
        assert {key.name for key in loader.pinned} == {"a"}
        assert (await registry.describe("a")).pin
        await registry.update("a", options={"x": "1"})
        assert loader.pinned
        await registry.update("a", pin=False)
        assert not loader.pinned
        assert (await registry.describe("a")).options == {"x": "1"}

    run(scenario)


def test_an_update_in_place_is_a_new_version_and_rows_that_began_keep_theirs(scene):
    async def scenario():
        registry = scene.registry
        await registry.register("a", scene.source("a", fill=1), pin=True)
        before = registry.find("a")
        await registry.update("a", src=scene.source("a", fill=2))
        after = registry.find("a")
        assert before.version != after.version
        assert (before.path / WEIGHTS).read_bytes() == weights(1)
        assert (after.path / WEIGHTS).read_bytes() == weights(2)
        assert {key.version for key in scene.loader.pinned} == {after.version}, "the old one is unpinned"

    run(scenario)


def test_old_versions_are_removed_when_their_grace_time_is_over(scene):
    async def scenario():
        registry = scene.registry
        await registry.register("a", scene.source("a", fill=1))
        before = registry.find("a")
        await registry.update("a", src=scene.source("a", fill=2))
        await registry.refresh()
        assert before.path.exists()
        scene.time += 4000
        await registry.refresh()
        assert not before.path.exists()
        assert registry.find("a").path.exists()

    run(scenario)


def test_a_version_that_rows_use_outlives_its_grace_time(scene):
    async def scenario():
        registry = scene.registry
        await registry.register("a", scene.source("a", fill=1))
        directory = AdapterDirectory(scene.folder, 0, registered=registry.find)
        async with directory.use("a") as used:
            await registry.update("a", src=scene.source("a", fill=2))
            async with directory.use("a") as later:
                assert (later.path / WEIGHTS).read_bytes() == weights(2)
            await registry.delete("a")
            scene.time += 4000
            await registry.refresh()
            assert (used.path / WEIGHTS).read_bytes() == weights(1)
        await registry.refresh()
        assert not used.path.exists()

    run(scenario)


@pytest.mark.parametrize("how", ["invalid", "unloadable", "full", "missing", "book"])
def test_an_update_that_fails_leaves_all_as_it_was(scene, how, monkeypatch):
    async def scenario():
        registry, loader = scene.registry, scene.loader
        await registry.register("a", scene.source("a", fill=1), pin=True)
        before, told, pinned = registry.find("a"), await registry.describe("a"), set(loader.pinned)
        src = scene.source("new", fill=2, **({"r": 0} if how == "invalid" else {}))
        if how == "missing":
            shutil.rmtree(src)
        if how == "unloadable":
            loader.bad["a"] = "module x is not there"
        if how == "full":
            loader.places = 0
        if how == "book":
            monkeypatch.setattr("worker.adapters.registrations.replace_file", _disk_full)
        with pytest.raises((InvalidRegistration, AdapterInvalid, AdapterStoreFull, StorageFull)):
            await registry.update("a", src=src, pin=False)
        assert registry.find("a") == before
        assert loader.pinned == pinned
        assert await registry.describe("a") == told
        assert resolve(scene.place, "a").version == before.version

    run(scenario)


@pytest.mark.parametrize("how", ["invalid", "unloadable", "full", "missing", "book"])
def test_a_registration_that_fails_leaves_nothing(scene, how, monkeypatch):
    async def scenario():
        src = scene.source("a", **({"r": 0} if how == "invalid" else {}))
        if how == "missing":
            shutil.rmtree(src)
        if how == "unloadable":
            scene.loader.bad["a"] = "module x is not there"
        if how == "full":
            scene.loader.places = 0
        with monkeypatch.context() as patch:
            if how == "book":
                patch.setattr("worker.adapters.registrations.replace_file", _disk_full)
            with pytest.raises((InvalidRegistration, AdapterInvalid, AdapterStoreFull, StorageFull)):
                await scene.registry.register("a", src, pin=True)
        assert scene.registry.find("a") is None
        assert await scene.names() == []
        assert not scene.loader.pinned
        assert not list(scene.place.iterdir())
        scene.loader.bad, scene.loader.places = {}, 1
        await scene.registry.register("a", scene.source("a"))
        assert await scene.names() == ["a"]

    run(scenario)


def _disk_full(*_):
    raise OSError(28, "No space left on device")


def test_two_registrations_of_one_name_at_once_make_one_adapter(scene):
    async def scenario():
        registry, loader = scene.registry, scene.loader
        sources = [scene.source(f"s{n}", fill=n) for n in range(4)]
        loader.may_load.clear()
        trying = [asyncio.create_task(registry.register("a", src)) for src in sources]
        await until(lambda: loader.loading)
        with pytest.raises(AdapterTaken):
            await registry.register("a", sources[0])
        loader.may_load.set()
        ends = await asyncio.gather(*trying, return_exceptions=True)
        assert [type(end) for end in ends if end is not None] == [AdapterTaken] * 3
        winner = ends.index(None)
        assert (registry.find("a").path / WEIGHTS).read_bytes() == weights(winner)
        assert (await registry.describe("a")).src == sources[winner]

    run(scenario)


def test_a_delete_while_the_adapter_is_being_registered_waits_and_deletes(scene):
    async def scenario():
        registry, loader = scene.registry, scene.loader
        loader.may_load.clear()
        registering = asyncio.create_task(registry.register("a", scene.source("a"), pin=True))
        await until(lambda: loader.loading)
        deleting = asyncio.create_task(registry.delete("a"))
        await asyncio.sleep(0.01)
        assert not deleting.done()
        loader.may_load.set()
        await registering
        await deleting
        assert registry.find("a") is None
        assert not loader.pinned
        assert len(registry._turns) == 0

    run(scenario)


def test_a_delete_behind_a_registration_that_fails_finds_nothing(scene):
    async def scenario():
        registry, loader = scene.registry, scene.loader
        loader.may_load.clear()
        loader.bad["a"] = "module x is not there"
        registering = asyncio.create_task(registry.register("a", scene.source("a")))
        await until(lambda: loader.loading)
        deleting = asyncio.create_task(registry.delete("a"))
        loader.may_load.set()
        ends = await asyncio.gather(registering, deleting, return_exceptions=True)
        assert [type(end) for end in ends] == [AdapterInvalid, UnknownAdapter]

    run(scenario)


def test_updates_of_one_adapter_take_turns(scene):
    async def scenario():
        registry = scene.registry
        await registry.register("a", scene.source("a", fill=0))
        sources = [scene.source(f"s{n}", fill=n) for n in range(1, 6)]
        await asyncio.gather(*(registry.update("a", src=src, pin=True) for src in sources))
        found, told = registry.find("a"), await registry.describe("a")
        assert (found.path / WEIGHTS).read_bytes() == weights(1 + sources.index(told.src))
        assert {key.version for key in scene.loader.pinned} == {found.version}

    run(scenario)


def test_different_names_are_registered_together(scene):
    async def scenario():
        registry, loader = scene.registry, scene.loader
        loader.places = 10
        loader.may_load.clear()
        trying = [asyncio.create_task(registry.register(f"a{n}", scene.source(f"a{n}"))) for n in range(5)]
        await until(lambda: len(loader.loading) == 5)
        loader.may_load.set()
        await asyncio.gather(*trying)
        assert await scene.names() == [f"a{n}" for n in range(5)]

    run(scenario)


def test_a_deleted_adapter_is_gone_and_its_files_wait_out_the_grace_time(scene):
    async def scenario():
        registry = scene.registry
        await registry.register("a", scene.source("a"), pin=True)
        found = registry.find("a")
        await registry.delete("a")
        assert registry.find("a") is None
        assert not scene.loader.pinned
        assert (found.path / WEIGHTS).exists(), "rows that began may not have read it yet"
        with pytest.raises(UnknownAdapter):
            await registry.delete("a")
        await registry.register("a", scene.source("a", fill=9))
        assert registry.find("a").version != found.version

    run(scenario)


# The adapters folder's own.


def test_adapters_of_the_folder_are_told_and_can_be_pinned_but_not_taken(scene):
    async def scenario():
        registry = scene.registry
        path = scene.mirrored("m")
        await registry.register("a", scene.source("a"))
        assert await scene.names() == ["a", "m"]
        info = await registry.describe("m")
        assert (info.src, info.preload, info.pin, info.tier) == (str(path), False, False, "disk")
        await registry.update("m", pin=True)
        assert {key.name for key in scene.loader.pinned} == {"m"}
        assert (await registry.describe("m")).pin
        await registry.update("m", pin=False)
        assert not scene.loader.pinned
        await registry.update("m", src=str(path))
        for refused in (
            registry.register("m", scene.source("m")),
            registry.update("m", src=scene.source("m")),
            registry.delete("m"),
        ):
            with pytest.raises(AdapterTaken, match=str(path)):
                await refused
        assert path.exists()
        assert registry.find("m") is None, "the folder has it"

    run(scenario)


def test_a_mirrored_adapter_is_told_with_the_prefix_it_comes_from(scene):
    async def scenario():
        paths = MirrorPaths(scene.folder)
        version = "0" * 64
        write_folder(paths.version_dir("m", version), adapter_files())
        scene.folder.mkdir()
        scene.folder.joinpath("m").symlink_to(paths.link_target("m", version))
        state = {"source": "s3://b/llama/adapters/", "folder": "adapters"}
        paths.state_file.write_text(json.dumps(state))
        info = await scene.registry.describe("m")
        assert (info.src, info.version) == ("s3://b/llama/adapters/m/", version)
        with pytest.raises(AdapterTaken, match="delete its upload, s3://b/llama/adapters/m/"):
            await scene.registry.delete("m")

    run(scenario)


def test_a_registration_keeps_its_name_when_an_upload_of_it_comes_and_a_warning_says_so(scene, caplog):
    async def scenario():
        registry = scene.registry
        await registry.register("a", scene.source("a", fill=1))
        version = scene.version("a")
        path = scene.mirrored("a", fill=2)
        with caplog.at_level(logging.WARNING, "worker.adapters.registry"):
            await registry.refresh()
            await registry.refresh()
        assert [record.message for record in caplog.records] == ["a registered adapter keeps its name"]
        info = await registry.describe("a")
        assert info.version == version
        assert str(path) in info.note
        directory = AdapterDirectory(scene.folder, 0, registered=registry.find)
        assert (await directory.find("a")).version == version
        await registry.delete("a")
        assert (await directory.find("a")).path == path
        assert (await registry.describe("a")).note is None

    run(scenario)


def test_rows_find_what_is_registered_and_what_is_in_the_folder(scene):
    async def scenario():
        scene.mirrored("m")
        await scene.registry.register("a", scene.source("a"))
        directory = AdapterDirectory(scene.folder, 0, registered=scene.registry.find)
        assert await directory.find("a") == scene.registry.find("a")
        assert (await directory.find("m")).path == scene.folder / "m"

    run(scenario)


def test_a_row_that_waits_for_a_name_gets_what_is_registered_meanwhile(scene):
    async def scenario():
        asked = asyncio.Event()
        directory = AdapterDirectory(
            scene.folder,
            30,
            registered=scene.registry.find,
            on_missing=asked.set,
            sleep=lambda _: asyncio.sleep(0),
        )
        waiting = asyncio.create_task(directory.find("a"))
        await asked.wait()
        await scene.registry.register("a", scene.source("a"))
        assert await waiting == scene.registry.find("a")

    run(scenario)


def test_a_folder_that_cannot_be_read_is_told_and_stops_nothing(scene, monkeypatch, caplog):
    async def scenario():
        scene.mirrored("m")
        await scene.registry.register("a", scene.source("a"))

        def broken(*_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("worker.adapters.folder_view.scan", broken)
        monkeypatch.setattr("worker.adapters.folder_view.resolve", broken)
        with pytest.raises(RegistryUnavailable, match="Permission denied"):
            await scene.names()
        await scene.registry.refresh()
        assert "were not looked at" in caplog.text
        assert scene.version("a")

    run(scenario)


def test_a_pinned_adapter_of_the_folder_is_followed_to_its_new_version(scene):
    async def scenario():
        registry, loader = scene.registry, scene.loader
        path = scene.mirrored("m", fill=1)
        await registry.update("m", pin=True)
        shutil.rmtree(path)
        await registry.refresh()
        assert not loader.pinned
        scene.mirrored("m", fill=2)
        await registry.refresh()
        assert {key.version for key in loader.pinned} == {(await registry.describe("m")).version}
        loads = len(loader.loading)
        await registry.refresh()
        assert len(loader.loading) == loads, "once for each version"

    run(scenario)


# Restarts.


def test_registrations_survive_a_restart(scene):
    async def scenario():
        registry = scene.registry
        scene.mirrored("m")
        await registry.register("a", scene.source("a"), pin=True, options={"x": "1"})
        await registry.register("lazy", scene.source("lazy"), preload=False)
        await registry.register("gone", scene.source("gone"))
        await registry.delete("gone")
        await registry.update("m", pin=True)
        before = {name: await registry.describe(name) for name in await scene.names()}
        shutil.rmtree(scene.root / "sources")

        again = await scene.restarted()
        after = {name: await again.registry.describe(name) for name in await again.names()}
        assert after == before
        assert again.loader.names == {"a", "m"}
        assert {key.name for key in again.loader.pinned} == {"a", "m"}
        await again.registry.update("a", pin=False)
        assert {key.name for key in again.loader.pinned} == {"m"}

    run(scenario)


def test_a_worker_that_registers_nothing_writes_nothing(scene):
    async def scenario():
        await scene.registry.start()
        await scene.registry.refresh()
        assert not (scene.root / "cache").exists()

    run(scenario)


@pytest.mark.parametrize("damage", ["cut", "gone", "config"])
def test_a_version_that_was_damaged_meanwhile_fails_its_rows_by_name_until_its_src_is_given(
    scene, damage, caplog
):
    async def scenario():
        src = scene.source("a")
        await scene.registry.register("a", src)
        await scene.registry.register("well", scene.source("well"))
        file = scene.registry.find("a").path / (CONFIG if damage == "config" else WEIGHTS)
        file.chmod(0o644)
        if damage == "gone":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-1])

        again = await scene.restarted()
        assert "a registered adapter cannot be used" in caplog.text
        with pytest.raises(AdapterInvalid, match=r"Adapter a is invalid: .*not whole"):
            again.registry.find("a")
        assert again.version("well")
        info = await again.registry.describe("a")
        assert (info.tier, info.src) == ("disk", src)
        assert "not whole" in info.note
        with pytest.raises(InvalidRegistration, match="not whole"):
            await again.registry.update("a", pin=True)
        await again.registry.update("a", src=src)
        assert (again.registry.find("a").path / WEIGHTS).read_bytes() == weights(1)
        assert (await again.registry.describe("a")).note is None

    run(scenario)


def test_what_cannot_be_preloaded_at_start_is_reported_and_does_not_stop_the_worker(scene, caplog):
    async def scenario():
        for name in "abc":
            await scene.registry.register(name, scene.source(name), pin=True)
        again = await scene.restarted(places=2)
        assert "a registered adapter was not loaded" in caplog.text
        assert {key.name for key in again.loader.pinned} == {"a", "b"}
        assert "no room" in (await again.registry.describe("c")).note
        assert again.version("c"), "rows may try"

    run(scenario)


def test_a_crash_between_version_and_book_leaves_what_the_book_says(scene):
    async def scenario():
        await scene.registry.register("a", scene.source("a", fill=1))
        version = scene.version("a")
        await scene.shelf.put("a", scene.source("a", fill=2))
        await scene.shelf.put("stray", scene.source("stray"))
        again = await scene.restarted()
        assert again.version("a") == version
        assert resolve(scene.place, "a").version == version
        assert resolve(scene.place, "stray") is None
        assert await again.names() == ["a"]

    run(scenario)


def test_a_book_that_is_none_is_left_alone_and_reported(scene, caplog):
    async def scenario():
        scene.book.parent.mkdir(parents=True)
        scene.book.write_text('{"registrations": [')
        scene.mirrored("m")
        await scene.registry.start()
        assert "registered adapters cannot be changed" in caplog.text
        assert await scene.names() == ["m"]
        with pytest.raises(RegistryUnavailable, match=r"registrations\.json cannot be read"):
            await scene.registry.register("a", scene.source("a"))
        assert scene.book.read_text() == '{"registrations": ['

    run(scenario)


def test_a_book_with_names_and_versions_that_are_none_leads_nowhere(scene):
    async def scenario():
        bad = [
            {"name": "../x", "src": "/x", "version": "0" * 64},
            {"name": "a", "src": "/x", "version": "../b"},
        ]
        scene.book.parent.mkdir(parents=True)
        scene.book.write_text(json.dumps({"registrations": bad}))
        await scene.registry.start()
        for name in ("../x", "a"):
            with pytest.raises(AdapterInvalid):
                scene.registry.find(name)

    run(scenario)


def test_a_second_worker_reads_what_is_registered_and_changes_it_only_when_it_is_alone(scene):
    async def scenario():
        await scene.registry.register("a", scene.source("a"))
        second = Scene(scene.root)
        await second.registry.start()
        assert second.version("a") == scene.version("a")
        with pytest.raises(RegistryUnavailable, match="another worker"):
            await second.registry.delete("a")
        await scene.registry.register("b", scene.source("b"))
        scene.registry.close()
        await second.registry.delete("a")
        assert await second.names() == ["b"]

    run(scenario)


def test_a_cache_that_cannot_be_written_is_told_to_whoever_registers(scene):
    async def scenario():
        scene.place.parent.parent.parent.mkdir(exist_ok=True)
        scene.place.parent.parent.write_text("a file in the way")
        with pytest.raises(RegistryUnavailable, match="cannot be used"):
            await scene.registry.register("a", scene.source("a"))

    run(scenario)


def test_the_lock_is_taken_at_the_first_change_and_given_back(scene):
    async def scenario():
        lock = MirrorPaths(scene.place).lock_file
        await asyncio.gather(*(scene.registry.register(f"a{n}", scene.source(f"a{n}")) for n in range(3)))
        with pytest.raises(Exception, match="another syncer"), exclusive(lock):
            pass
        scene.registry.close()
        with exclusive(lock):
            pass

    run(scenario)


# Hostile sources.


def test_links_in_a_folder_lead_nowhere(scene):
    async def scenario():
        secret = scene.root / "secret.json"
        secret.write_text('{"password": 1}')
        src, folder = scene.source("a"), scene.root / "sources" / "a"
        (folder / "tokenizer.json").symlink_to(secret)
        (folder / "deep").symlink_to(scene.root)
        await scene.registry.register("a", src)
        assert sorted(file.name for file in scene.registry.find("a").path.iterdir()) == [
            CONFIG,
            WEIGHTS,
            "manifest.json",
        ]

        (folder / CONFIG).unlink()
        (folder / CONFIG).symlink_to(secret)
        with pytest.raises(InvalidRegistration, match=f"{CONFIG} is "):
            await scene.registry.register("b", src)

    run(scenario)


def test_a_folder_over_the_limits_is_refused_before_it_is_copied(tmp_path):
    from adapters_sync.inventory import Limits

    async def scenario():
        scene = Scene(tmp_path, limits=Limits(adapter_bytes=100, rank=16))
        with pytest.raises(InvalidRegistration, match="the limit is 100"):
            await scene.registry.register("a", scene.source("a"))
        scene = Scene(tmp_path / "b", limits=Limits(rank=2))
        with pytest.raises(InvalidRegistration, match="r is 4; the limit is 2"):
            await scene.registry.register("a", scene.source("a"))
        scene = Scene(tmp_path / "c", limits=Limits(free_bytes=1 << 60))
        with pytest.raises(StorageFull, match="must stay free"):
            await scene.registry.register("a", scene.source("a"))

    run(scenario)


def test_a_file_that_changes_while_it_is_copied_is_not_taken(scene, monkeypatch):
    from worker.adapters import sources

    async def scenario():
        src = scene.source("a", fill=1)
        look = sources._look_into

        def then_change(*args):
            found = look(*args)
            write_folder(scene.root / "sources" / "a", {WEIGHTS: weights(7)})
            return found

        monkeypatch.setattr(sources, "_look_into", then_change)
        with pytest.raises((RegistryUnavailable, InvalidRegistration)):
            await scene.registry.register("a", src)
        assert scene.registry.find("a") is None

    run(scenario)


def test_a_special_file_is_no_part_of_an_adapter(scene):
    async def scenario():
        src = scene.source("a")
        os.mkfifo(f"{src}/tokenizer.json")
        await scene.registry.register("a", src)
        assert not (scene.registry.find("a").path / "tokenizer.json").exists()

    run(scenario)


# S3.


def test_an_adapter_in_s3_is_fetched_whole_and_updated_in_place(bucket, scene):
    async def scenario():
        bucket.put_adapter("there", fill=1)
        src = f"{bucket.uri}there/"
        await scene.registry.register("here", src, options={"a": "b"})
        first = scene.registry.find("here")
        assert (first.path / WEIGHTS).read_bytes() == weights(1)
        manifest = json.loads((first.path / "manifest.json").read_text())
        assert (manifest["name"], manifest["version"], manifest["source"]) == ("here", first.version, src)
        bucket.put_adapter("there", fill=2)
        await scene.registry.update("here", src=src)
        second = scene.registry.find("here")
        assert (second.path / WEIGHTS).read_bytes() == weights(2)
        assert (first.path / WEIGHTS).read_bytes() == weights(1)
        assert (first.path / CONFIG).samefile(second.path / CONFIG), "what is the same travels once"
        await scene.registry.update("here", src=src)
        assert scene.registry.find("here") == second

    run(scenario)


def test_a_plain_upload_in_s3_need_not_settle(bucket, scene):
    async def scenario():
        for path, data in adapter_files().items():
            bucket.put(f"plain/{path}", data)
        await scene.registry.register("a", f"{bucket.uri}plain")
        assert (scene.registry.find("a").path / WEIGHTS).read_bytes() == weights(1)

    run(scenario)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda b: b.remove(f"a/{WEIGHTS}"), "adapter_model.safetensors is missing"),
        (lambda b: b.remove_adapter("a"), "there is nothing under"),
        (lambda b: b.put("a/_manifest.json", b'{"finished": false}'), "an upload has begun and not ended"),
        (lambda b: b.put("a/_manifest.json", b"{"), "is not a manifest"),
        (lambda b: b.put("a/../x.json", b"{}"), "'..'"),
        (lambda b: b.put(f"a/{WEIGHTS}", b"junk"), "truncated"),
    ],
)
def test_what_in_s3_is_no_adapter_is_refused(bucket, scene, change, says):
    async def scenario():
        bucket.put_adapter("a")
        change(bucket)
        with pytest.raises(InvalidRegistration, match=says):
            await scene.registry.register("a", f"{bucket.uri}a/")
        assert scene.registry.find("a") is None

    run(scenario)


def test_a_content_that_is_not_what_its_uploader_read_is_refused(bucket, scene):
    async def scenario():
        bucket.put_adapter("a", fill=1)
        bucket.put(f"a/{WEIGHTS}", weights(3))
        with pytest.raises(InvalidRegistration, match="its manifest says"):
            await scene.registry.register("a", f"{bucket.uri}a/")

    run(scenario)


def test_a_prefix_that_takes_too_long_to_list_is_given_up(bucket, scene, monkeypatch):
    monkeypatch.setattr("worker.adapters.sources._LIST_SECONDS", 0.0)

    async def scenario():
        with pytest.raises(RegistryUnavailable, match="took more than"):
            await scene.registry.register("a", f"{bucket.uri}a/")

    run(scenario)


def test_s3_that_does_not_answer_is_worth_another_try(bucket, scene):
    async def scenario():
        with pytest.raises(RegistryUnavailable, match="NoSuchBucket"):
            await scene.registry.register("a", "s3://no-such-bucket-at-all/a/")
        assert await scene.names() == []

    run(scenario)
