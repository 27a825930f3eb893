import pytest

from worker.errors import InvalidMessage
from worker.jobs import ChatMessage, SamplingParams, Task
from worker.wire.parameters import NAMES
from worker.wire.rows import read_rows


def rows(body, adapter=None, max_rows=100, **known):
    return read_rows(body, max_rows=max_rows, adapter=adapter, **known)


def only_failure(item, **body):
    good, bad = rows({"inputs": ["good", item], **body})
    assert good.failure is None
    assert (bad.text, bad.messages) == (None, None)
    return bad.failure


def test_one_text_is_one_row():
    (row,) = rows({"inputs": "hello"})
    assert (row.index, row.id, row.text, row.adapter) == (0, "0", "hello", None)
    assert row.params == SamplingParams()


def test_texts_and_row_objects_mix_in_order():
    read = rows(
        {
            "inputs": [
                "a",
                {"input": "b", "id": "x", "adapter": "fr", "parameters": {"max_new_tokens": 5}},
                {"inputs": "c"},
                {"messages": [{"role": "user", "content": "d"}]},
            ]
        }
    )
    assert [row.id for row in read] == ["0", "x", "2", "3"]
    assert [row.text for row in read] == ["a", "b", "c", None]
    assert read[3].messages == (ChatMessage(role="user", content="d"),)
    assert read[1].adapter == "fr"
    assert read[1].params.max_new_tokens == 5


@pytest.mark.parametrize("value", [None, 5, {}, {"input": "x"}, True])
def test_inputs_of_another_kind_are_refused(value):
    with pytest.raises(
        InvalidMessage, match=r"inputs is .*; it must be text, a list of texts or a list of row"
    ):
        rows({"inputs": value})


def test_the_number_of_rows_at_its_limits():
    assert len(rows({"inputs": ["x"] * 3}, max_rows=3)) == 3
    for count in (0, 4):
        with pytest.raises(InvalidMessage, match=f"inputs has {count} rows; it must have from 1 to 3"):
            rows({"inputs": ["x"] * count}, max_rows=3)


# Adapters


def test_one_adapter_is_for_every_row_and_a_list_is_aligned():
    assert [row.adapter for row in rows({"inputs": ["x", "y"], "adapters": "fr"})] == ["fr", "fr"]
    aligned = rows({"inputs": ["x", "y", "z"], "adapters": ["fr", "", None]})
    assert [row.adapter for row in aligned] == ["fr", None, None]


@pytest.mark.parametrize("adapters", ["", None])
def test_the_base_model_has_three_spellings(adapters):
    assert rows({"inputs": "x", "adapters": adapters})[0].adapter is None


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_adapters_is_refused_in_djls_words(count):
    with pytest.raises(InvalidMessage) as caught:
        rows({"inputs": ["x", "y"], "adapters": ["fr"] * count})
    assert str(caught.value) == "Number of adapters is not equal to the number of inputs"


def test_a_rows_own_adapter_wins_over_adapters_and_an_attribute_over_both():
    body = {
        "inputs": [{"input": "x", "adapter": "own"}, {"input": "y", "adapter": None}, "z"],
        "adapters": "all",
    }
    assert [row.adapter for row in rows(body)] == ["own", None, "all"]
    assert [row.adapter for row in rows(body, adapter="attr")] == ["attr"] * 3
    assert [row.adapter for row in rows(body, adapter="")] == [None] * 3


@pytest.mark.parametrize("adapters", [5, {}, True])
def test_adapters_of_another_kind_are_refused(adapters):
    with pytest.raises(InvalidMessage, match=r"adapters is .*; it must be text or a list of them"):
        rows({"inputs": "x", "adapters": adapters})


def test_one_bad_adapter_fails_one_row():
    good, bad = rows({"inputs": ["x", "y"], "adapters": ["fr", 5]})
    assert good.adapter == "fr"
    assert (bad.failure.code, bad.failure.message) == (
        "invalid_line",
        "the row's adapter is 5; it must be text",
    )


# Parameters


def test_parameters_align_and_a_rows_own_win_name_by_name():
    body = {
        "inputs": [{"input": "x", "parameters": {"max_new_tokens": 9, "temperature": None}}, "y"],
        "parameters": {"max_new_tokens": 5, "temperature": 0.5, "details": True},
    }
    own, shared = rows(body)
    assert own.params == SamplingParams(max_new_tokens=9, details=True)
    assert shared.params == SamplingParams(max_new_tokens=5, temperature=0.5, do_sample=True, details=True)
    aligned = rows({"inputs": ["x", "y"], "parameters": [{"seed": 1}, None]})
    assert [row.params.seed for row in aligned] == [1, None]


def test_a_wrong_number_or_kind_of_parameters_is_refused():
    with pytest.raises(InvalidMessage, match="Number of parameters is not equal to the number of inputs"):
        rows({"inputs": ["x", "y"], "parameters": [{}]})
    with pytest.raises(InvalidMessage, match="parameters is text; it must be an object or a list of them"):
        rows({"inputs": "x", "parameters": "{}"})


def test_bad_parameters_fail_their_row_and_keep_its_id_and_adapter():
    good, bad = rows(
        {"inputs": ["x", {"id": "r", "input": "y", "adapter": "fr", "parameters": {"top_p": 2}}]}
    )
    assert good.failure is None
    assert (bad.id, bad.adapter, bad.failure.code) == ("r", "fr", "invalid_parameters")
    assert "top_p is 2; it must be a number above 0 and at most 1" in bad.failure.message
    assert bad.failure.retryable is False


def test_bad_shared_parameters_fail_every_row():
    read = rows({"inputs": ["x", "y"], "parameters": {"max_tokens": 2}})
    assert [row.failure.code for row in read] == ["invalid_parameters"] * 2


@pytest.mark.parametrize("parameters", [[], "x", 5])
def test_a_rows_parameters_are_an_object(parameters):
    failure = only_failure({"input": "x", "parameters": parameters})
    assert failure.code == "invalid_parameters"
    assert only_failure("x", parameters=[{}, parameters]).code == "invalid_parameters"


# Rows that are no rows


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (5, "the row is a number"),
        (None, "the row is null"),
        ([], "the row is a list of 0"),
        ({}, "the row has no input"),
        ({"input": None}, "the row has no input"),
        ({"input": "x", "messages": []}, "the row has input and messages"),
        ({"input": 5}, "the row's input is a number; it must be text or a list of token ids"),
        ({"input": [True]}, "the row's input is a list of 1"),
        ({"input": [1, -1]}, "the row's input[1] is -1; it must be a token id from 0 to 2147483647"),
        ({"input": "x", "target": "y"}, "the row has a target, which is for jobs of task score"),
        ({"input": ["x"]}, "the row's input is a list of 1"),
        ({"input": "x", "adaptor": "y"}, "'adaptor' is unknown; the nearest known name is adapter"),
        ({"messages": []}, "messages is a list of 0"),
        ({"messages": "hi"}, "messages is text"),
        ({"messages": ["hi"]}, r"messages[0] is text"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is null"),
        ({"messages": [{"role": 1, "content": "x"}]}, "messages[0].role is a number"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages[0]: 'name' is unknown"),
        ({"id": 5, "input": "x"}, "the row's id is 5"),
        ({"id": "", "input": "x"}, "the row's id is ''"),
    ],
)
def test_a_row_that_is_no_row_fails_alone(item, words):
    failure = only_failure(item)
    assert failure.code == "invalid_line"
    assert words in failure.message


def test_messages_about_rows_do_not_repeat_prompts():
    failure = only_failure({"messages": "the patient's name is Ann"})
    assert "Ann" not in failure.message


# Ids


def test_ids_name_rows_in_order_and_a_rows_own_id_wins():
    assert [row.id for row in rows({"inputs": ["x", "y"], "ids": ["a", "b"]})] == ["a", "b"]
    assert [row.id for row in rows({"inputs": [{"id": "own", "input": "x"}], "ids": ["a"]})] == ["own"]


@pytest.mark.parametrize("ids", ["a", ["a"], ["a", "b", "c"], ["a", 5], ["a", ""], ["a", None]])
def test_other_ids_are_refused(ids):
    with pytest.raises(InvalidMessage, match="ids"):
        rows({"inputs": ["x", "y"], "ids": ids})


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": ["x", "y"], "ids": ["a", "a"]},
        {"inputs": [{"id": "a", "input": "x"}, {"id": "a", "input": "y"}]},
        {"inputs": [{"id": "1", "input": "x"}, "y"]},
    ],
)
def test_repeated_ids_are_refused(body):
    with pytest.raises(InvalidMessage, match="is used 2 times; ids must be unique"):
        rows(body)


def test_a_row_without_a_sound_id_fails_alone_even_where_its_place_is_taken():
    good, bad = rows({"inputs": [{"id": "1", "input": "x"}, {"id": 5, "input": "y"}]})
    assert (good.id, bad.id, bad.index) == ("1", "1", 1)
    assert bad.failure is not None


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "x" * 129, "é", "a" * 500_000])
def test_name_that_no_adapter_can_have_fails_its_row_in_few_words(name):
    good, bad = rows({"inputs": ["a", "b"], "adapters": ["", name]})
    assert good.failure is None
    assert bad.failure.code == "adapter_not_found"
    assert len(bad.failure.message) < 400
    assert bad.adapter == name[:128]


# Token ids, and what is scored


def test_input_may_be_token_ids():
    (row,) = rows({"inputs": [{"input": [5, 0, 2**31 - 1]}]})
    assert (row.tokens, row.text, row.failure) == ((5, 0, 2**31 - 1), None, None)


def scored(item, **body):
    (row,) = rows({"inputs": [item], **body}, task=Task.SCORE)
    assert row.task is Task.SCORE, "an error line has the shape of its neighbours"
    return row


def test_row_to_be_scored_has_an_input_and_may_have_a_target():
    assert scored({"input": "a", "target": "b"}).target == "b"
    assert scored({"input": "", "target": "b"}).text == ""
    assert scored({"input": [1], "target": [2]}).target == (2,)
    assert scored({"messages": [{"role": "user", "content": "a"}], "target": "b"}).target == "b"
    for item in ("a", {"input": "a"}, {"input": "a", "target": None}):
        row = scored(item)
        assert (row.text, row.target, row.failure) == ("a", None, None)
        assert row.params == SamplingParams(max_new_tokens=0)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"input": "a", "target": 5}, "the row's target is a number; it must be text, as its input is"),
        ({"input": "a", "target": [5]}, "the row's target is a list of 1; it must be text, as its input is"),
        ({"input": [5], "target": "a"}, "the row's target is text; it must be token ids, as its input is"),
        ({"input": [5], "target": [-5]}, "the row's target[0] is -5"),
        ({"messages": [{"role": "user", "content": "a"}]}, "the row has messages and no target"),
        ({"target": "a"}, "the row has no input"),
    ],
)
def test_row_that_cannot_be_scored_fails_alone(item, words):
    failure = scored(item).failure
    assert failure.code == "invalid_line"
    assert words in failure.message


@pytest.mark.parametrize("name", sorted(NAMES - {"details"}))
def test_parameters_of_generation_are_an_error_on_a_row_to_be_scored_that_names_them(name):
    for failure in (
        scored({"input": "a b", "parameters": {name: 1}}).failure,
        scored("a b", parameters={name: 1}).failure,
    ):
        assert failure.code == "invalid_parameters"
        assert f"parameter {name} is for rows that generate" in failure.message


def test_row_to_be_scored_may_have_details():
    assert scored({"input": "a b", "parameters": {"details": True, "seed": None}}).params.details
    assert "'detail' is unknown" in scored({"input": "a", "parameters": {"detail": True}}).failure.message
