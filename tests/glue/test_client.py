"""What a sender's files become: jobs with their rows, or with a reference to a file beside their results."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.glue.support import PREFIX, World
from worker import wire
from worker.errors import InvalidMessage
from worker.jobs import Output
from worker.sender import client, files
from worker.sender.client import Order, Written, send_local, send_stored
from worker.sender.files import find_files, read_file
from worker.wire.manifest import Status

ORDER = Order(output=Output(PREFIX))
ROWS = [f"row {number}" for number in range(11)]


@pytest.fixture
def world(monkeypatch) -> World:
    world = World()

    @asynccontextmanager
    async def services(queue_url: str) -> AsyncIterator[Any]:
        yield world.store, world.queue

    monkeypatch.setattr(client, "_services", services)
    monkeypatch.setattr(files, "MAX_ROWS", 5)
    return world


def write(path: Path, rows: list[Any]) -> Path:
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def send(world: World, path: Path, order: Order = ORDER, job_id: str = "j") -> list[tuple[str, str]]:
    """Ids and names of the jobs that were sent."""
    sent: list[tuple[str, str]] = []
    found = [(name, read_file(one, str(one))) for name, one in find_files(str(path))]
    asyncio.run(send_local("q", found, order, job_id, lambda job, name: sent.append((job.job_id, name))))
    return sent


def bodies(world: World) -> list[dict[str, Any]]:
    return [json.loads(message.body) for message in world.queue._messages.values()]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_small_file_goes_in_the_message(world, tmp_path, name):
    assert send(world, write(tmp_path / name, ROWS[:5])) == [("j", "")]
    assert bodies(world)[0]["inputs"] == ROWS[:5]
    assert not world.store.uris


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_large_file_goes_where_its_results_go_and_every_row_is_answered(world, tmp_path, name):
    path = write(tmp_path / name, ROWS)
    written: list[Written] = []
    found = [("", read_file(path, str(path)))]
    asyncio.run(send_local("q", found, ORDER, "j", lambda job, _: written.append(job)))
    uri = wire.input_uri(ORDER.output, "j", packed=name.endswith(".gz"))
    assert bodies(world)[0]["input"]["uri"] == uri
    asyncio.run(world.handle_all())
    manifest = world.manifest("j")
    assert (manifest.status, manifest.request_counts.total) == (Status.COMPLETED, 11)
    assert manifest.digest == written[0].digest, "by which --wait knows its own job"


def test_a_command_cut_short_may_be_given_again_and_another_file_may_not_take_its_place(world, tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    assert send(world, path) == send(world, path) == [("j", "")]
    assert len({body["input"]["etag"] for body in bodies(world)}) == 1
    with pytest.raises(InvalidMessage, match="--id was used before, for another file: s3://out/jobs/j/input"):
        send(world, write(tmp_path / "rows.jsonl", [*ROWS, "more"]))


def test_the_first_bad_row_is_told_by_its_line_and_nothing_is_sent(world, tmp_path):
    path = write(tmp_path / "rows.jsonl", [*ROWS, {"input": 5}, {"input": 6}])
    with pytest.raises(InvalidMessage, match=r"rows\.jsonl, line 12: the row's input is a number"):
        send(world, path)
    with pytest.raises(InvalidMessage, match=r"line 1: parameter 'sead' is unknown"):
        send(world, write(path, ROWS), Order(output=ORDER.output, parameters={"sead": 1}))
    with pytest.raises(InvalidMessage, match="task is 'guess'"):
        send(world, path, Order(output=ORDER.output, task="guess"))
    assert not bodies(world)
    assert not world.store.uris


def test_a_large_file_needs_to_know_where_it_may_go(world, tmp_path):
    with pytest.raises(InvalidMessage, match="too large for a message: say where it may go"):
        send(world, write(tmp_path / "rows.jsonl", ROWS), Order())
    with pytest.raises(
        InvalidMessage, match="--adapter: for a file that is too large for a message give one"
    ):
        send(world, tmp_path / "rows.jsonl", Order(output=ORDER.output, adapters=["a"] * 11))


def test_of_a_folder_every_file_of_rows_is_a_job(world, tmp_path):
    write(tmp_path / "a" / "x y.jsonl", ROWS[:2])
    write(tmp_path / "b.jsonl.gz", ROWS)
    write(tmp_path / "notes.txt", ROWS)
    (tmp_path / "a" / "empty").mkdir()
    (odd, name), plain = send(world, tmp_path)
    assert plain == ("j-b.jsonl.gz", "b.jsonl.gz")
    assert name == "a/x y.jsonl"
    assert odd.startswith("j-a-x-y.jsonl-"), "what had to be replaced is told apart by a digest"
    asyncio.run(world.handle_all())
    assert world.manifest(odd).request_counts.total == 2
    assert world.manifest("j-b.jsonl.gz").request_counts.total == 11
    with pytest.raises(InvalidMessage, match="makes the job id"):
        send(world, tmp_path, job_id="j" * 125)
    with pytest.raises(InvalidMessage, match=r"nothing in it ends in \.jsonl or"):
        find_files(str(tmp_path / "a" / "empty"))


def test_files_whose_names_differ_are_different_jobs():
    names = ["a/b.jsonl", "a-b.jsonl", "東京.jsonl", "大阪.jsonl", "ä.jsonl", "ö.jsonl"]
    assert len({client.named("nightly", name) for name in names}) == len(names)
    assert client.named("nightly", "a-b.jsonl") == "nightly-a-b.jsonl"


def test_objects_are_named_and_not_fetched(world):
    async def scenario() -> list[tuple[str, str]]:
        sent: list[tuple[str, str]] = []
        for key in ("in/a.jsonl", "in/b/c.jsonl.gz", "in/d.txt"):
            await world.store.put(f"s3://in/{key}", b'"x"\n')
        for uri, job_id in (("s3://in/in/", "all"), ("s3://in/in/d.txt", "one")):
            await send_stored("q", uri, ORDER, job_id, lambda job, name: sent.append((job.job_id, name)))
        return sent

    assert asyncio.run(scenario()) == [
        ("all-a.jsonl", "a.jsonl"),
        (client.named("all", "b/c.jsonl.gz"), "b/c.jsonl.gz"),
        ("one", ""),
    ]
    assert [body["input"]["uri"] for body in bodies(world)] == [
        "s3://in/in/a.jsonl",
        "s3://in/in/b/c.jsonl.gz",
        "s3://in/in/d.txt",
    ]
    assert all(body["input"]["etag"] for body in bodies(world))


@pytest.mark.parametrize(
    "data", [b"not packed", gzip.compress(b"x" * 99)[:-9], gzip.compress(b"{}")[:14] + b"\xff\xff"]
)
def test_a_file_that_is_no_gzip_file_is_told(tmp_path, data):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(data)
    with pytest.raises(InvalidMessage, match=f"--file {path}"):
        read_file(path, str(path))


def test_a_line_that_no_row_can_be_is_told_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 100)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'"a"\n"' + b"x" * 200 + b'"\n')
    with pytest.raises(InvalidMessage, match="line 2 has more than 100 bytes"):
        read_file(path, str(path))
