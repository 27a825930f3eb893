import os
import time

import pytest

from adapters_sync import layout
from adapters_sync.layout import MirrorPaths, is_version, resolve, scan
from tests.sync.builders import WEIGHTS, weights, write_folder

V1, V2 = "1" * 64, "2" * 64


@pytest.fixture
def paths(tmp_path):
    paths = MirrorPaths(tmp_path / "model" / "adapters")
    paths.adapters_dir.mkdir(parents=True)
    return paths


def link(paths, name, target):
    path = paths.link(name)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def test_a_link_is_resolved_to_its_immutable_version(paths):
    folder = write_folder(paths.version_dir("a", V1))
    link(paths, "a", paths.link_target("a", V1))
    found = resolve(paths.adapters_dir, "a")
    assert (found.name, found.version, found.path) == ("a", V1, folder)


def test_a_reader_keeps_its_version_while_the_link_moves_on(paths):
    write_folder(paths.version_dir("a", V1))
    write_folder(paths.version_dir("a", V2))
    link(paths, "a", paths.link_target("a", V1))
    held = resolve(paths.adapters_dir, "a")
    link(paths, "a", paths.link_target("a", V2))
    assert held.path.name == V1
    assert (held.path / WEIGHTS).exists()
    assert resolve(paths.adapters_dir, "a").version == V2


def test_the_adapters_folder_may_itself_be_a_link(paths, tmp_path):
    write_folder(paths.version_dir("a", V1))
    link(paths, "a", paths.link_target("a", V1))
    (tmp_path / "elsewhere").symlink_to(paths.adapters_dir)
    assert resolve(tmp_path / "elsewhere", "a").version == V1


@pytest.mark.parametrize(
    "target",
    [f"../.versions/other/{V1}", "../../outside", "/etc", f"../.versions/a/{V2}", "../.versions/a/x", "a",
     f"../.versions/a/../other/{V1}"],
)  # fmt: skip
def test_a_link_that_leads_elsewhere_is_no_adapter(paths, tmp_path, target):
    write_folder(paths.version_dir("other", V1))
    write_folder(paths.version_dir("a", "x"))
    write_folder(tmp_path / "outside")
    link(paths, "a", target)
    assert resolve(paths.adapters_dir, "a") is None
    assert scan(paths.adapters_dir) == []


@pytest.mark.parametrize("name", ["", ".", "..", "../model", "a/b", ".hidden", "a" * 200, "a\0b"])
def test_a_bad_name_is_no_adapter(paths, name):
    write_folder(paths.adapters_dir)
    assert resolve(paths.adapters_dir, name) is None


def test_only_folders_with_a_configuration_count(paths):
    write_folder(paths.adapters_dir / "good")
    write_folder(paths.adapters_dir / ".hidden")
    (paths.adapters_dir / "empty").mkdir()
    (paths.adapters_dir / "file.json").write_text("{}")
    assert [one.name for one in scan(paths.adapters_dir)] == ["good"]


def test_scan_is_sorted_and_a_missing_folder_is_empty(paths, tmp_path):
    for name in "cab":
        write_folder(paths.adapters_dir / name)
    assert [one.name for one in scan(paths.adapters_dir)] == ["a", "b", "c"]
    assert scan(tmp_path / "nowhere") == []


def test_the_version_of_a_plain_folder_follows_its_content(paths):
    folder = write_folder(paths.adapters_dir / "a")
    before = resolve(paths.adapters_dir, "a")
    assert is_version(before.version)
    assert before.path == folder
    (folder / WEIGHTS).write_bytes(weights(2))
    changed = resolve(paths.adapters_dir, "a").version
    (folder / WEIGHTS).write_bytes(weights(1))
    assert changed != before.version
    assert resolve(paths.adapters_dir, "a") == before


def test_files_that_are_not_carried_do_not_change_a_version(paths):
    folder = write_folder(paths.adapters_dir / "a")
    before = resolve(paths.adapters_dir, "a")
    (folder / "optimizer.pt").write_bytes(b"x")
    (folder / ".DS_Store").write_bytes(b"x")
    assert resolve(paths.adapters_dir, "a") == before


def test_equal_content_has_one_version_under_any_name(paths):
    versions = {resolve(write_folder(paths.adapters_dir / name).parent, name).version for name in "ab"}
    assert len(versions) == 1


def test_an_old_file_is_hashed_once(paths, monkeypatch):
    folder = write_folder(paths.adapters_dir / "a")
    old = time.time() - 60
    for path in folder.iterdir():
        os.utime(path, (old, old))
    first = resolve(paths.adapters_dir, "a")
    monkeypatch.setattr(layout, "_hash", lambda path: pytest.fail("hashed again"))
    assert resolve(paths.adapters_dir, "a") == first


def test_a_fresh_file_is_hashed_again_since_its_time_stamp_may_not_move(paths):
    folder = write_folder(paths.adapters_dir / "a")
    status = (folder / WEIGHTS).stat()
    before = resolve(paths.adapters_dir, "a")
    (folder / WEIGHTS).write_bytes(weights(7))
    os.utime(folder / WEIGHTS, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert resolve(paths.adapters_dir, "a").version != before.version
