import pytest

from adapters_sync.complete import Complete, Hopeless, Incomplete, Quiet, judge
from adapters_sync.inventory import RemoteAdapter
from adapters_sync.manifests import UploadedFile, UploadManifest
from tests.sync.builders import CONFIG, WEIGHTS, remote_adapter, remote_file

RESTLESS, QUIET = Quiet(0, 1), Quiet(60, 2)
SETTLE = 60


def manifest(*extra, sizes=(10, 10), **changes):
    files = [UploadedFile(CONFIG, sizes[0], "0" * 64), UploadedFile(WEIGHTS, sizes[1], "1" * 64), *extra]
    return UploadManifest(files=tuple(files), **changes)


def test_a_manifest_that_matches_completes_at_the_first_look():
    verdict = judge(remote_adapter(), manifest(), RESTLESS, SETTLE)
    assert isinstance(verdict, Complete)
    assert verdict.sha256 == {CONFIG: "0" * 64, WEIGHTS: "1" * 64}


@pytest.mark.parametrize(
    ("declared", "reason"),
    [
        (manifest(sizes=(10, 11)), "has 10 bytes, and _manifest.json says 11"),
        (manifest(UploadedFile("more.json", 1, "2" * 64)), "names 'more.json', which is not there"),
        (UploadManifest(files=manifest().files[:1]), f"does not name '{WEIGHTS}'"),
    ],
)
def test_a_manifest_that_differs_leaves_it_to_quiet(declared, reason):
    verdict = judge(remote_adapter(), declared, RESTLESS, SETTLE)
    assert isinstance(verdict, Incomplete)
    assert verdict.seconds_left == SETTLE - RESTLESS.seconds
    assert reason in verdict.reason
    assert judge(remote_adapter(), declared, QUIET, SETTLE) == Complete()


def test_files_that_are_not_carried_do_not_have_to_match():
    declared = manifest(UploadedFile("optimizer.pt", 5, "3" * 64))
    assert isinstance(judge(remote_adapter(), declared, RESTLESS, SETTLE), Complete)


def test_an_upload_that_has_begun_and_not_ended_is_never_taken_for_a_quiet_one():
    success = remote_file("_SUCCESS", 0, modified=1e9)
    verdict = judge(remote_adapter(success=success), manifest(finished=False), Quiet(1e9, 1000), SETTLE)
    assert isinstance(verdict, Incomplete)
    assert verdict.seconds_left is None


@pytest.mark.parametrize(("modified", "complete"), [(101, True), (100, False), (99, False)])
def test_success_counts_when_it_is_newer_than_every_file(modified, complete):
    adapter = remote_adapter(success=remote_file("_SUCCESS", 0, modified=modified))
    assert isinstance(judge(adapter, None, RESTLESS, SETTLE), Complete) is complete


@pytest.mark.parametrize(
    ("quiet", "complete"),
    [
        (Quiet(60, 2), True),
        (Quiet(61, 9), True),
        (Quiet(59, 9), False),
        (Quiet(600, 1), False),
    ],
)
def test_a_plain_upload_settles_for_its_time_over_two_polls(quiet, complete):
    verdict = judge(remote_adapter(), None, quiet, SETTLE)
    assert isinstance(verdict, Complete) is complete
    assert complete or verdict.seconds_left == max(0, SETTLE - quiet.seconds)


def test_without_a_settle_time_it_still_takes_two_polls():
    assert isinstance(judge(remote_adapter(), None, Quiet(0, 1), 0), Incomplete)
    assert isinstance(judge(remote_adapter(), None, Quiet(0, 2), 0), Complete)


def test_a_plain_upload_without_the_required_files_waits_for_ever():
    verdict = judge(RemoteAdapter(name="a", files=(remote_file(CONFIG),)), None, Quiet(1e9, 999), SETTLE)
    assert verdict == Incomplete(f"{WEIGHTS} is missing")


def test_said_to_be_complete_without_the_required_files_is_hopeless():
    adapter = RemoteAdapter(name="a", files=(remote_file(CONFIG),))
    declared = UploadManifest(files=manifest().files[:1])
    assert isinstance(judge(adapter, declared, RESTLESS, SETTLE), Hopeless)
    success = RemoteAdapter(name="a", files=adapter.files, success=remote_file("_SUCCESS", 0, modified=200))
    assert isinstance(judge(success, None, RESTLESS, SETTLE), Hopeless)


def test_pickled_weights_are_hopeless_at_once():
    adapter = RemoteAdapter(name="a", files=(remote_file(CONFIG),), skipped=("adapter_model.bin",))
    verdict = judge(adapter, None, RESTLESS, SETTLE)
    assert isinstance(verdict, Hopeless)
    assert "pickle" in verdict.reason
