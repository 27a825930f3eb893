"""Which calls meet which fault."""

from collections import Counter

import pytest

from tests.faults.calls import Call
from tests.faults.kinds import Fault
from tests.faults.plans import Chance, Plan, Rule

PUT = Call("s3", "PutObject", "b/out/j/manifest.json", conditional=True)
GET = Call("s3", "GetObject", "b/out/j/manifest.json")


def test_rule_strikes_so_many_calls_and_lets_the_first_ones_pass():
    plan = Plan([Rule(Fault.ERROR, "PutObject", times=2, skip=1)])
    assert [plan.choose(PUT) for _ in range(5)] == [None, Fault.ERROR, Fault.ERROR, None, None]


def test_rule_is_for_its_operation_and_its_targets():
    plan = Plan([Rule(Fault.ERROR, "PutObject", "manifest", times=9)])
    assert plan.choose(GET) is None
    assert plan.choose(PUT._replace(target="b/out/j/results")) is None
    assert plan.choose(PUT) is Fault.ERROR


def test_rules_come_before_chance():
    plan = Plan([Rule(Fault.DROP, "PutObject")], Chance(1.0, kinds=[Fault.DELAY]))
    assert [plan.choose(PUT) for _ in range(2)] == [Fault.DROP, Fault.DELAY]


def test_same_seed_and_same_calls_are_the_same_faults():
    def drawn(seed):
        chance = Chance(0.3, seed=seed)
        return [chance.choose(call) for call in [PUT, GET] * 100]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_chance_strikes_about_its_share():
    chance = Chance(0.05, seed=3)
    struck = sum(chance.choose(GET) is not None for _ in range(10_000))
    assert 400 < struck < 600


def test_chance_chooses_of_all_kinds_that_fit():
    chance = Chance(1.0)
    calls = [PUT, GET, Call("sqs", "ReceiveMessage"), Call("sqs", "DeleteMessageBatch")]
    struck = {call.operation: {chance.choose(call) for _ in range(500)} for call in calls}
    for call in calls:
        assert struck[call.operation] == {kind for kind in Fault if kind.fits(call)}
    assert set.union(*struck.values()) == set(Fault)


def test_part_of_the_faults_outlasts_every_attempt_of_the_sdk():
    chance = Chance(0.5, seed=4, stubborn=0.5)
    outcomes = Counter()
    for number in range(1000):
        call = GET._replace(invocation=str(number))
        first = chance.choose(call)
        if first is not None:
            later = [chance.choose(call) for _ in range(3)]
            assert later in ([first] * 3, [None] * 3)
            outcomes[later[0] is first] += 1
    assert outcomes[True] > 150
    assert outcomes[False] > 150


@pytest.mark.parametrize("kind", Fault)
def test_every_fault_fits_something_and_none_fits_what_it_cannot_strike(kind):
    calls = [PUT, GET, Call("sqs", "ReceiveMessage"), Call("sqs", "ChangeMessageVisibilityBatch")]
    assert any(kind.fits(call) for call in calls)
    if kind in {Fault.CONFLICT, Fault.ABORTED}:
        assert not kind.fits(GET)
