import asyncio
import json

import pytest

from adapters_sync.errors import InvalidAdapter, InvalidUri, RemoteUnavailable, SettingsError, SyncError
from adapters_sync.inventory import Limits
from adapters_sync.layout import resolve
from adapters_sync.push import pack, push
from adapters_sync.remote import Remote
from tests.sync.builders import CONFIG, WEIGHTS, adapter_files, weights, write_folder


def send(folder, uri, **kwargs):
    return asyncio.run(push(folder, uri, **kwargs))


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "sql", adapter_files() | {"tokenizer/merges.txt": b"a b"})


def test_what_was_pushed_is_published_at_once_under_the_version_that_push_told(s3_world, folder):
    told = []
    pushed = send(folder, s3_world.bucket.uri, progress=lambda path, count: told.append((path, count)))
    assert s3_world.sync().published == (f"sql@{pushed.version}",)
    found = resolve(s3_world.adapters_dir, "sql")
    assert found.version == pushed.version
    assert (found.path / "tokenizer" / "merges.txt").read_bytes() == b"a b"
    assert pushed.uri == f"{s3_world.bucket.uri}sql/"
    assert (pushed.files, pushed.bytes) == (3, sum(count for _, count in told))


def test_the_name_may_be_in_the_address(bucket, folder):
    assert send(folder, f"{bucket.uri}other").name == "other"
    assert all(path.startswith("other/") for path in bucket.paths())


def test_the_manifest_is_last_and_a_notice_is_first(bucket, folder, monkeypatch):
    written = []
    real_put, real_file = Remote.put, Remote.put_file

    async def put(self, path, data):
        if path == "_manifest.json":
            written.append(json.loads(data)["finished"])
        await real_put(self, path, data)

    async def put_file(self, path, source, progress):
        written.append(path)
        return await real_file(self, path, source, progress)

    monkeypatch.setattr(Remote, "put", put)
    monkeypatch.setattr(Remote, "put_file", put_file)
    send(folder, bucket.uri)
    assert written[0] is False
    assert written[-1] is True
    assert sorted(written[1:-1]) == [CONFIG, WEIGHTS, "tokenizer/merges.txt"]


def test_a_push_that_breaks_off_is_never_published_and_the_next_one_mends_it(s3_world, folder, monkeypatch):
    send(folder, s3_world.bucket.uri)
    s3_world.sync()
    good = resolve(s3_world.adapters_dir, "sql")
    (folder / WEIGHTS).write_bytes(weights(2))
    (folder / CONFIG).write_bytes(adapter_files(r=8)[CONFIG])
    real = Remote.put_file

    async def failing(self, path, source, progress):
        if path == WEIGHTS:
            await real(self, CONFIG, folder / CONFIG, progress)
            raise RemoteUnavailable("cable pulled")
        return await real(self, path, source, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Remote, "put_file", failing)
        with pytest.raises(RemoteUnavailable):
            send(folder, s3_world.bucket.uri)

    async def many_passes(mirror):
        for _ in range(3):
            report = await mirror.run_once()
            s3_world.time += 1000
        return report.adapters[0]

    status = s3_world.with_mirror(many_passes)
    assert resolve(s3_world.adapters_dir, "sql") == good
    assert status.state == "pending"
    assert "finished: false" in status.reason
    pushed = send(folder, s3_world.bucket.uri)
    s3_world.sync()
    assert resolve(s3_world.adapters_dir, "sql").version == pushed.version


def test_files_that_the_adapter_no_longer_has_go(bucket, folder):
    send(folder, bucket.uri)
    (folder / "tokenizer" / "merges.txt").unlink()
    bucket.put("sql/notes.pkl", b"not ours to delete")
    send(folder, bucket.uri)
    assert bucket.paths() == ["sql/_manifest.json", f"sql/{CONFIG}", f"sql/{WEIGHTS}", "sql/notes.pkl"]


def test_pushing_the_same_again_keeps_the_version(bucket, folder):
    assert send(folder, bucket.uri).version == send(folder, bucket.uri).version


def test_what_is_not_carried_is_left_out_and_told(bucket, folder, tmp_path):
    (folder / "optimizer.pt").write_bytes(b"x")
    (folder / "link.json").symlink_to(folder / CONFIG)
    (folder / "linked").symlink_to(tmp_path)
    pushed = send(folder, bucket.uri)
    assert pushed.left_out == ("link.json", "linked", "optimizer.pt")
    assert "sql/optimizer.pt" not in bucket.paths()


def test_what_a_mirror_would_refuse_is_refused_before_anything_is_sent(folder):
    uri = "s3://bucket/model/adapters/"
    with pytest.raises(InvalidAdapter, match="limit is 2"):
        pack(folder, uri, Limits(rank=2))
    with pytest.raises(InvalidAdapter, match="more than 3 objects"):
        pack(folder, uri, Limits(adapter_files=3))  # the manifest is the fourth
    assert pack(folder, uri, Limits(adapter_files=4)).name == "sql"
    with pytest.raises(InvalidAdapter, match="the limit is 10"):
        pack(folder, uri, Limits(adapter_bytes=10))
    with pytest.raises(InvalidUri):
        pack(folder, "s3://bucket/elsewhere/")
    with pytest.raises(SettingsError, match="is not a folder"):
        pack(folder / "nowhere", uri)
    (folder / WEIGHTS).write_bytes(weights()[:-1])
    with pytest.raises(InvalidAdapter, match="truncated"):
        pack(folder, uri)


def test_somebody_else_writing_there_is_noticed(bucket, folder, monkeypatch):
    real = Remote.put

    async def put(self, path, data):
        await real(self, path, data)
        if b'"finished": true' in data:
            bucket.put("sql/late.json", b"{}")

    monkeypatch.setattr(Remote, "put", put)
    with pytest.raises(SyncError, match="is somebody else writing there"):
        send(folder, bucket.uri)
