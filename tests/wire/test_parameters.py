import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.errors import InvalidParameters
from worker.jobs import SamplingParams
from worker.wire.parameters import (
    MAX_NEW_TOKENS,
    MAX_SEED,
    MAX_STOP_CHARACTERS,
    MAX_STOP_SEQUENCES,
    NAMES,
    read_parameters,
)

fuzzed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def test_names_are_those_of_the_noun():
    assert {field.name for field in msgspec.structs.fields(SamplingParams)} | {
        "decoder_input_details"
    } == NAMES


def test_nothing_said_is_greedy_with_djls_thirty_tokens():
    assert read_parameters({}) == SamplingParams(max_new_tokens=30, do_sample=False)


def test_null_counts_as_absent():
    assert read_parameters(dict.fromkeys(NAMES)) == SamplingParams()


@pytest.mark.parametrize(
    ("given_parameters", "sampled"),
    [
        ({}, False),
        ({"temperature": 0.5}, True),
        ({"temperature": 1}, True),
        ({"top_k": 0}, True),
        ({"top_p": 1.0}, True),
        ({"seed": 1, "repetition_penalty": 1.2}, False),
        ({"temperature": 0}, False),
        ({"temperature": 0, "top_p": 0.5}, False),
        ({"do_sample": False, "temperature": 0.7}, False),
        ({"do_sample": False, "temperature": 0}, False),
        ({"do_sample": True}, True),
    ],
)
def test_do_sample_follows_tgis_rule_when_absent(given_parameters, sampled):
    assert read_parameters(given_parameters).do_sample is sampled


def test_temperature_zero_never_reaches_the_sampler():
    assert read_parameters({"temperature": 0}).temperature == 1.0
    assert read_parameters({"temperature": -0.0}).temperature == 1.0


def test_sampling_at_temperature_zero_is_a_contradiction():
    with pytest.raises(InvalidParameters, match="temperature is 0; with do_sample true"):
        read_parameters({"do_sample": True, "temperature": 0})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 1),
        ("max_new_tokens", MAX_NEW_TOKENS),
        ("temperature", 1e-6),
        ("temperature", 1e6),
        ("top_k", 0),
        ("top_k", MAX_NEW_TOKENS),
        ("top_p", 1),
        ("top_p", 5e-324),
        ("repetition_penalty", 1e-3),
        ("repetition_penalty", 1e3),
        ("seed", 0),
        ("seed", MAX_SEED),
        ("ignore_eos", True),
        ("details", True),
        ("return_full_text", True),
    ],
)
def test_the_last_good_value(name, value):
    assert getattr(read_parameters({name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", MAX_NEW_TOKENS + 1),
        ("max_new_tokens", 30.0),
        ("max_new_tokens", "30"),
        ("max_new_tokens", True),
        ("temperature", -1e-9),
        ("temperature", 9e-7),
        ("temperature", 1.1e6),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 10**400),
        ("temperature", True),
        ("temperature", "1"),
        ("top_k", -1),
        ("top_k", False),
        ("top_p", 0),
        ("top_p", 1.0000001),
        ("top_p", float("nan")),
        ("repetition_penalty", 0),
        ("repetition_penalty", 9e-4),
        ("repetition_penalty", 1001),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
        ("seed", 10**4000),
        ("do_sample", 1),
        ("do_sample", "true"),
        ("details", 0),
        ("ignore_eos", []),
        ("decoder_input_details", True),
        ("decoder_input_details", 0),
        ("stop_sequences", "stop"),
        ("stop_sequences", {}),
    ],
)
def test_the_first_bad_value_is_refused_by_name_value_and_limit(name, value):
    with pytest.raises(InvalidParameters, match=rf"parameter {name} is .+; it must be .+") as caught:
        read_parameters({name: value})
    assert len(str(caught.value)) < 250


def test_stop_sequences_at_their_limits():
    most = ["s" * MAX_STOP_CHARACTERS] * MAX_STOP_SEQUENCES
    assert read_parameters({"stop_sequences": most}).stop_sequences == tuple(most)
    assert read_parameters({"stop_sequences": []}).stop_sequences == ()
    for bad in ([*most, "s"], ["s" * (MAX_STOP_CHARACTERS + 1)], [""], ["a", 1], [None]):
        with pytest.raises(InvalidParameters, match="stop_sequences"):
            read_parameters({"stop_sequences": bad})


def test_decoder_input_details_false_is_accepted():
    assert read_parameters({"decoder_input_details": False}) == SamplingParams()


@pytest.mark.parametrize(
    ("name", "near"),
    [("max_tokens", "max_new_tokens"), ("Temperature", "temperature"), ("topk", "top_k"), ("", "")],
)
def test_an_unknown_name_is_refused_with_the_nearest_known_one(name, near):
    with pytest.raises(InvalidParameters, match=f"'{name}' is unknown; the nearest known one is {near}"):
        read_parameters({name: 1})


def test_a_long_unknown_name_makes_a_short_message():
    with pytest.raises(InvalidParameters) as caught:
        read_parameters({"x" * 1_000_000: 1})
    assert len(str(caught.value)) < 200


@fuzzed
@given(st.dictionaries(st.sampled_from(sorted(NAMES)) | st.text(max_size=5), JSON, max_size=4))
def test_any_json_object_is_read_or_refused(given_parameters):
    try:
        params = read_parameters(given_parameters)
    except InvalidParameters:
        return
    assert params.temperature > 0
    assert 0 < params.top_p <= 1
    assert params.max_new_tokens >= 1
