"""Messages that nobody should send do not stop a worker, and none of them gets lost."""

import re
from collections import Counter

import pytest

from tests.poison import __main__ as command
from tests.poison.accounts import Accounts
from tests.poison.messages import KINDS, NOT_SENT, messages
from tests.poison.run import Report, run

COUNT, SEED = 150, 1


def test_fuzzed_messages_leave_the_worker_serving_and_all_of_them_are_accounted_for(tmp_path):
    report = run(messages(COUNT, SEED), tmp_path)
    assert report.mistakes == []
    assert report.accounts.tally.total() == COUNT
    assert "internal" not in report.accounts.rows
    assert set(report.said) <= {"the job is refused"}, "nothing was given back, and nothing broke"


def test_a_seed_gives_the_same_messages_of_every_kind():
    fuzzed = messages(1000, SEED)
    assert fuzzed == messages(1000, SEED)
    assert fuzzed != messages(1000, SEED + 1)
    assert {one.kind for one in fuzzed} == set(KINDS)


def test_what_is_sent_is_what_sqs_takes():
    for one in messages(1000, SEED):
        texts = [value.get("StringValue", "x") for value in one.attributes.values()]
        size = sum(len(text.encode()) for text in [one.body, *one.attributes, *texts])
        assert 0 < size < 1_048_576
        assert all(text and not NOT_SENT.search(text) for text in [one.body, *texts])
        assert all(re.fullmatch(r"[A-Za-z0-9_.-]{1,256}", name) for name in one.attributes)


@pytest.mark.parametrize(("mistakes", "code"), [([], 0), (["one is missing"], 1)])
def test_the_command_shows_the_tally_and_ends_by_what_is_wrong(monkeypatch, capsys, mistakes, code):
    accounts = Accounts(Counter({("good", "completed"): 5}), Counter({"": 9, "oom": 1}), [])
    monkeypatch.setattr(command, "run", lambda fuzzed, folder: Report(accounts, mistakes, [], 1.0))
    monkeypatch.setattr(command, "quiet", lambda: None)
    assert command.main(["--messages", "5", "--seed", "2"]) == code
    printed = capsys.readouterr().out
    assert "5 messages, seed 2" in printed
    assert "rows: completed 9, oom 1" in printed
    assert all(one in printed for one in mistakes)


def test_the_command_shows_messages_instead(capsys):
    assert command.main(["--messages", "7", "--show"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 7
