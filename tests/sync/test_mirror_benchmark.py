"""The mirror's benchmark does what it says, at its smallest."""

import re

import pytest

from tests.benchmarks import mirror


def test_a_round_is_measured_and_an_idle_pass_is_one_listing_that_opens_nothing(capsys):
    assert mirror.main(["--adapters", "3", "--server", "moto", "--aws", ""]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^loramill sync +first +[\d.]+ ", printed, re.MULTILINE)
    assert re.search(r"^loramill sync +again +[\d.]+ ", printed, re.MULTILINE)
    assert "an idle pass asks for 1 ListObjectsV2 (1 pages hold the listing)" in printed
    assert "steps on the volume: none" in printed
    assert mirror.HOW_TO_GET_AWS in printed


def test_ratios_are_theirs_over_ours():
    def runs(*seconds):
        return [mirror.Run(one, 1.0, 80.0) for one in seconds]

    lines = mirror.table(
        {
            "loramill sync": {"first": runs(3.0, 2.0, 9.0), "again": runs(1.0)},
            "aws s3 sync": {"first": runs(6.0, 5.0, 1.0), "again": runs(0.5)},
        }
    ).splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["80", "1.67", "80", "0.50"]


def test_steps_on_a_volume_are_heard_and_those_elsewhere_are_not(tmp_path):
    (tmp_path / "volume").mkdir()
    with mirror.steps_on(tmp_path / "volume") as steps:
        (tmp_path / "elsewhere").write_text("x")
        assert not steps
        (tmp_path / "volume" / "file").write_text("x")
        (tmp_path / "volume" / "file").stat()
        (tmp_path / "volume" / "file").rename(tmp_path / "volume" / "other")
    (tmp_path / "volume" / "later").write_text("x")
    assert steps == {"open": 1, "rename": 1}


@pytest.mark.parametrize("arguments", ["--adapters 0", "--rounds x", "--server minio"])
def test_arguments_that_make_no_sense_end_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        mirror.main(arguments.split())
    assert raised.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_a_process_that_fails_shows_what_it_printed(capsys):
    with pytest.raises(Exception, match="exit status 1"):
        mirror.run(["sh", "-c", "echo trouble; exit 1"])
    assert "trouble" in capsys.readouterr().err
