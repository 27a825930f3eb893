import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_sync.complete import Complete, Hopeless, Incomplete
from adapters_sync.plan import Action, Decision, Desired, Local, plan
from tests.sync.builders import remote_adapter

NEW = remote_adapter()
SAME, OLD, FOREIGN, BROKEN = Local(NEW.version), Local("0" * 64), Local(None), Local(NEW.version, whole=False)
DONE, WAITING, BAD = Complete(), Incomplete("not yet"), Hopeless("never")


def decide(desired, local, absences=0, **kwargs):
    """The decision about adapter `a`, beside a neighbour that is fine."""
    neighbour = remote_adapter("neighbour")
    actions = plan(
        {"neighbour": Desired(neighbour, DONE)} | ({"a": desired} if desired else {}),
        {"neighbour": Local(neighbour.version)} | ({"a": local} if local else {}),
        {"a": absences},
        **kwargs,
    )
    assert Action("neighbour", Decision.KEEP) in actions
    return next(((one.decision, one.reason) for one in actions if one.name == "a"), None)


FAULTY = Desired(remote_adapter(fault="bad key"), DONE)
SOMETHING = "something that is not the mirror's has this name on disk"


@pytest.mark.parametrize("local", [None, SAME, OLD, FOREIGN, BROKEN])
def test_refused_by_name_key_or_cap_is_refused_whatever_is_on_disk(local):
    assert decide(FAULTY, local) == (Decision.REFUSE, "bad key")


@pytest.mark.parametrize(
    ("desired", "local", "expected"),
    [
        (Desired(NEW, DONE), FOREIGN, (Decision.REFUSE, SOMETHING)),
        (Desired(NEW, WAITING), SAME, (Decision.KEEP, None)),
        (Desired(NEW, DONE, "was bad"), None, (Decision.REFUSE, "was bad")),
        (Desired(NEW, DONE, "was bad"), OLD, (Decision.REFUSE, "was bad")),
        (Desired(NEW, BAD), None, (Decision.REFUSE, "never")),
        (Desired(NEW, BAD), OLD, (Decision.REFUSE, "never")),
        (Desired(NEW, WAITING), None, (Decision.WAIT, "not yet")),
        (Desired(NEW, WAITING), OLD, (Decision.WAIT, "not yet")),
        (Desired(NEW, WAITING), BROKEN, (Decision.WAIT, "not yet")),
        (Desired(NEW, DONE), None, (Decision.PUBLISH, None)),
        (Desired(NEW, DONE), OLD, (Decision.PUBLISH, None)),
        (Desired(NEW, DONE), BROKEN, (Decision.PUBLISH, None)),
        (None, FOREIGN, None),
        (None, None, None),
    ],
)
def test_each_line_of_the_table(desired, local, expected):
    assert decide(desired, local) == expected


@pytest.mark.parametrize("local", [SAME, BROKEN])
@pytest.mark.parametrize(
    ("absences", "decision"), [(1, Decision.MISS), (2, Decision.DELETE), (3, Decision.DELETE)]
)
def test_absent_adapters_go_at_the_second_listing(local, absences, decision):
    assert decide(None, local, absences)[0] is decision


@pytest.mark.parametrize("newcomers", [{}, {"new": Desired(remote_adapter("new"), DONE)}])
def test_nothing_is_deleted_when_nothing_that_is_on_disk_is_left_in_s3(newcomers):
    local = {"a": OLD, "b": OLD}
    actions = plan(newcomers, local, {"a": 5, "b": 2})
    assert {one.decision for one in actions if one.name in local} == {Decision.HOLD}
    actions = plan(newcomers, local, {"a": 5, "b": 2}, allow_empty=True)
    assert {one.decision for one in actions if one.name in local} == {Decision.DELETE}


def test_all_going_in_two_steps_is_held_too():
    actions = plan({}, {"a": OLD, "b": OLD}, {"a": 2, "b": 1})
    assert [one.decision for one in actions] == [Decision.HOLD, Decision.MISS]


def test_of_twins_the_one_on_disk_wins_else_the_first():
    both = {name: Desired(remote_adapter(name), DONE) for name in ("Foo", "foo")}
    version = both["foo"].adapter.version
    assert [one.decision for one in plan(both, {}, {})] == [Decision.PUBLISH, Decision.REFUSE]
    actions = plan(both, {"foo": Local(version)}, {})
    assert [(one.name, one.decision) for one in actions] == [("Foo", Decision.REFUSE), ("foo", Decision.KEEP)]
    assert actions[0].reason == "differs from 'foo' only in case"


def test_a_faulty_twin_costs_the_good_one_nothing():
    both = {
        "Foo": Desired(remote_adapter("Foo", fault="bad key"), DONE),
        "foo": Desired(remote_adapter("foo"), DONE),
    }
    assert [one.decision for one in plan(both, {}, {})] == [Decision.REFUSE, Decision.PUBLISH]


names = st.sampled_from(["a", "A", "b", "c"])
locals_ = st.dictionaries(names, st.sampled_from([SAME, OLD, FOREIGN, BROKEN]))
remotes = st.dictionaries(
    names,
    st.tuples(
        st.sampled_from([DONE, WAITING, BAD]), st.sampled_from([None, "x"]), st.sampled_from([None, "y"])
    ),
)


@given(remotes, locals_, st.dictionaries(names, st.integers(0, 3)), st.booleans())
def test_only_an_adapter_that_s3_lacked_twice_is_ever_deleted(remote, local, absences, allow_empty):
    desired = {
        name: Desired(remote_adapter(name, fault=fault), verdict, refused)
        for name, (verdict, fault, refused) in remote.items()
    }
    actions = plan(desired, local, absences, allow_empty=allow_empty)
    linked = {name for name, one in local.items() if one.version}
    assert sorted(one.name for one in actions) == sorted(desired.keys() | linked)
    for action in actions:
        if action.decision is Decision.DELETE:
            assert action.name not in desired
            assert action.name in linked
            assert absences[action.name] >= 2
            assert allow_empty or linked & desired.keys()
        if action.decision is Decision.PUBLISH:
            assert desired[action.name].verdict is DONE
            assert local.get(action.name) not in (SAME, FOREIGN)
