import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_sync.inventory import Limits, take_inventory
from adapters_sync.layout import is_version
from adapters_sync.names import fault_in_path, is_adapter_name, is_carried
from tests.sync.builders import CONFIG, WEIGHTS, remote_file

GOOD = (remote_file(f"good/{CONFIG}"), remote_file(f"good/{WEIGHTS}"))


def take(*paths, limits=Limits(), size=10):  # noqa: B008
    return take_inventory([*GOOD, *(remote_file(path, size) for path in paths)], limits)


@pytest.mark.parametrize(
    "path",
    ["bad/../good/x.json", "bad/a//b.json", "bad/a\\b.json", "bad/x\0.json", "bad/./x.json", "bad//x.json"],
)
def test_a_bad_key_costs_its_own_adapter_and_nobody_else(path):
    found = take(f"bad/{CONFIG}", f"bad/{WEIGHTS}", path)
    assert found["bad"].fault is not None
    assert found["good"].fault is None
    assert len(found["good"].files) == 2


@pytest.mark.parametrize("name", ["", "..", ".", ".x", "a b", "é", "x" * 129])
def test_a_bad_name_is_refused_and_reported(name):
    found = take(f"{name}/{CONFIG}")
    assert found.keys() == {"good", name}
    assert "does not match" in found[name].fault


def test_objects_outside_any_adapter_and_folder_markers_belong_to_nobody():
    assert take("README.md").keys() == {"good"}
    found = take("", "empty/", "good/", "good/sub/", size=0)
    assert found.keys() == {"good"}
    assert found["good"].fault is None


def test_markers_and_skipped_files_are_no_content():
    before = take()["good"]
    found = take("good/_manifest.json", "good/_SUCCESS", "good/optimizer.pt", "good/train.py")["good"]
    assert found.version == before.version
    assert found.skipped == ("optimizer.pt", "train.py")
    assert found.manifest is not None
    assert found.success is not None


@pytest.mark.parametrize(
    "changed",
    [{"etag": '"other"'}, {"size": 11}, {"path": "good/other.json"}],
)
def test_the_version_follows_path_size_and_etag(changed):
    other = remote_file(**({"path": f"good/{CONFIG}"} | changed))
    assert take_inventory([other, GOOD[1]], Limits())["good"].version != take()["good"].version


def test_the_version_is_a_digest_that_ignores_order_and_time():
    again = [remote_file(one.path, modified=999) for one in reversed(GOOD)]
    assert take_inventory(again, Limits())["good"].version == take()["good"].version
    assert is_version(take()["good"].version)


def test_an_adapter_that_is_as_it_was_is_the_same_object_and_any_other_is_not():
    before = take(f"other/{CONFIG}")
    again = take_inventory([*GOOD, remote_file(f"other/{CONFIG}", size=11)], Limits(), before)
    assert again["good"] is before["good"]
    assert again["other"] is not before["other"]
    assert again == take_inventory([*GOOD, remote_file(f"other/{CONFIG}", size=11)], Limits())


def test_names_that_differ_in_case_within_one_adapter_are_refused():
    assert "only in case" in take("good/README.md", "good/readme.md")["good"].fault


def test_caps_on_files_and_bytes_are_named():
    assert "more than 2 objects" in take("good/x.json", limits=Limits(adapter_files=2))["good"].fault
    assert "20 bytes; the limit is 19" in take(limits=Limits(adapter_bytes=19))["good"].fault
    assert "_manifest.json has" in take("good/_manifest.json", size=1 << 23)["good"].fault


def test_a_million_objects_under_one_name_are_not_kept():
    many = (remote_file(f"good/{number}.json") for number in range(10_000))
    found = take_inventory(many, Limits(adapter_files=5))["good"]
    assert len(found.files) == 5
    assert found.fault is not None


@given(st.lists(st.text(alphabet="ab./\\\0é", max_size=12), max_size=8))
def test_whatever_the_keys_what_has_no_fault_is_safe_to_write(paths):
    for name, adapter in take_inventory([remote_file(path) for path in paths], Limits()).items():
        if adapter.fault is None:
            assert is_adapter_name(name)
            assert all(fault_in_path(file.path) is None and is_carried(file.path) for file in adapter.files)
