"""Passes of a running mirror that find nothing changed: what they leave out, and what they never miss."""

import pytest

from adapters_sync import passes
from adapters_sync.base_model import BaseModel, write_base_model
from adapters_sync.layout import resolve, scan
from adapters_sync.state import AdapterState
from tests.sync.builders import CONFIG, WEIGHTS, config, weights


@pytest.fixture
def planned(monkeypatch):
    """Counts the plans that are made."""
    made, real = [], passes.plan
    monkeypatch.setattr(passes, "plan", lambda *args, **kwargs: made.append(1) or real(*args, **kwargs))
    return made


async def calm(mirror, planned):
    """Let the mirror come to rest."""
    for _ in range(3):
        report = await mirror.run_once()
    before = len(planned)
    assert (await mirror.run_once()).adapters == report.adapters
    assert len(planned) == before, "the last pass was not idle"


def test_a_pass_that_finds_nothing_changed_plans_nothing_and_says_the_same(world, planned):
    world.bucket.put_adapter("a")
    world.bucket.put_adapter("bad", {CONFIG: config(r=0), WEIGHTS: weights()})

    async def work(mirror):
        first = await mirror.run_once()
        await calm(mirror, planned)
        world.time += 100
        report = await mirror.run_once()
        assert first.published
        assert (report.published, report.fetched_bytes, report.failures) == ((), 0, {})
        assert [one.state for one in report.adapters] == [AdapterState.READY, AdapterState.INVALID]
        assert report.finished_at == world.time.seconds

    world.with_mirror(work)


def test_after_idle_passes_every_change_is_seen(world, planned):
    world.bucket.put_adapter("a", fill=1)
    world.bucket.put_adapter("b", fill=2)

    async def work(mirror):
        await calm(mirror, planned)
        world.bucket.put_adapter("a", fill=3, r=8)
        assert len((await mirror.run_once()).published) == 1
        await calm(mirror, planned)
        world.bucket.remove_adapter("b")
        assert (await mirror.run_once()).deleted == ()
        assert (await mirror.run_once()).deleted == ("b",)
        await calm(mirror, planned)
        (resolve(world.adapters_dir, "a").path / "manifest.json").unlink()
        assert len((await mirror.run_once()).published) == 1
        await calm(mirror, planned)
        world.paths.link("a").unlink()
        assert len((await mirror.run_once()).published) == 1

    world.with_mirror(work)
    assert [one.name for one in scan(world.adapters_dir)] == ["a"]


def test_after_idle_passes_another_base_model_is_judged_by(world, planned):
    world.bucket.put_adapter("wide", {CONFIG: config(r=64), WEIGHTS: weights()})

    async def work(mirror):
        write_base_model(world.paths, BaseModel(modules={}, max_lora_rank=8))
        await calm(mirror, planned)
        world.paths.base_model_file.unlink()
        return await mirror.run_once()

    world.paths.adapters_dir.mkdir(parents=True)
    assert len(world.with_mirror(work).published) == 1


def test_a_plain_upload_that_settles_is_not_taken_for_rest(world):
    for path, data in {CONFIG: config(), WEIGHTS: weights()}.items():
        world.bucket.put(f"plain/{path}", data)

    async def work(mirror):
        reports = []
        for _ in range(5):
            reports.append(await mirror.run_once())
            world.time += 20
        return [len(report.published) for report in reports]

    assert world.with_mirror(work, settle_seconds=60) == [0, 0, 0, 1, 0]


def test_an_idle_pass_collects_what_is_due(world, planned):
    world.bucket.put_adapter("a", fill=1)

    async def work(mirror):
        await mirror.run_once()
        world.bucket.put_adapter("a", fill=2, r=8)
        await calm(mirror, planned)
        world.time += 60
        return await mirror.run_once()

    assert world.with_mirror(work, grace_seconds=50).collected == 1
