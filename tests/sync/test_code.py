"""An adapter's own `model.py`: carried to workers that run it, counted in the version, left out elsewhere."""

import asyncio

import pytest

from adapters_sync import disk
from adapters_sync.complete import Complete, Incomplete, Quiet, judge
from adapters_sync.inventory import Limits, take_inventory
from adapters_sync.layout import left_out_code, resolve
from adapters_sync.manifests import UploadedFile, UploadManifest
from adapters_sync.names import is_carried, why_skipped
from adapters_sync.push import push
from adapters_sync.settings import SyncSettings, read
from tests.sync.builders import adapter_files, remote_file, state_of, write_folder

WITH_CODE = adapter_files() | {"model.py": b"1\n"}
CODE = Limits(code=True)


def test_of_code_only_the_adapters_own_model_py_is_carried_and_only_where_that_is_wanted():
    assert is_carried("model.py", code=True)
    assert why_skipped("model.py") == "code is carried where custom_code is on"
    for path in ("modeling.py", "deep/model.py", "model.pyc", "MODEL.PY"):
        assert not is_carried(path, code=True)


def test_a_mirror_carries_code_where_it_is_run_and_counts_it_in_the_version(any_world):
    any_world.bucket.put_adapter("a", WITH_CODE)
    any_world.bucket.put_adapter("plain")
    assert len(any_world.sync().published) == 2
    without = resolve(any_world.adapters_dir, "a")
    assert not (without.path / "model.py").exists()
    assert left_out_code(without)
    assert state_of(any_world, "a").skipped == ("model.py",)
    plain = resolve(any_world.adapters_dir, "plain")
    assert not left_out_code(plain)

    assert [one.partition("@")[0] for one in any_world.sync(limits=CODE).published] == ["a"]
    first = resolve(any_world.adapters_dir, "a")
    assert first.version != without.version
    assert (first.path / "model.py").read_bytes() == b"1\n"
    assert not left_out_code(first)
    assert disk.load(any_world.paths, "a", first.version).file("model.py").size == 2
    assert resolve(any_world.adapters_dir, "plain") == plain

    any_world.bucket.put_adapter("a", WITH_CODE | {"model.py": b"2\n"})
    assert any_world.sync(limits=CODE).published
    second = resolve(any_world.adapters_dir, "a")
    assert second.version not in {first.version, without.version}
    assert (second.path / "model.py").read_bytes() == b"2\n"


def test_a_manifest_that_names_code_is_compared_where_code_is_carried():
    files = [remote_file(f"a/{name}", len(data)) for name, data in WITH_CODE.items() if name != "model.py"]
    told = tuple(UploadedFile(name, len(data), "0" * 64) for name, data in WITH_CODE.items())
    manifest, quiet = UploadManifest(told), Quiet(0, 0)
    without = take_inventory(files, Limits())["a"]
    assert isinstance(judge(without, manifest, quiet, 1), Complete)
    missing = take_inventory(files, CODE)["a"]
    verdict = judge(missing, manifest, quiet, 1)
    assert isinstance(verdict, Incomplete)
    assert "model.py" in verdict.reason
    whole = take_inventory([*files, remote_file("a/model.py", 2)], CODE)["a"]
    assert isinstance(judge(whole, manifest, quiet, 1), Complete)


def test_push_sends_code_and_takes_away_what_is_gone(s3_world, tmp_path):
    folder = write_folder(tmp_path / "a", WITH_CODE)
    pushed = asyncio.run(push(folder, s3_world.bucket.uri))
    assert (pushed.files, pushed.left_out) == (3, ())
    assert s3_world.sync(limits=CODE).published == (f"a@{pushed.version}",)
    (folder / "model.py").unlink()
    pushed = asyncio.run(push(folder, s3_world.bucket.uri))
    assert "a/model.py" not in s3_world.bucket.paths()
    assert s3_world.sync().published == (f"a@{pushed.version}",)


def test_a_plain_folder_has_another_version_with_other_code(tmp_path):
    folder = write_folder(tmp_path / "a", WITH_CODE)
    first = resolve(tmp_path, "a")
    (folder / "model.py").write_bytes(b"2\n")
    second = resolve(tmp_path, "a")
    (folder / "model.py").unlink()
    assert len({first.version, second.version, resolve(tmp_path, "a").version}) == 3


@pytest.mark.parametrize("value", ["true", "false"])
def test_a_mirror_of_its_own_is_told_by_the_workers_setting(value):
    assert read(SyncSettings, environ={"LORAMILL_CUSTOM_CODE": value}).custom_code == (value == "true")
