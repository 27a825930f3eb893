import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.errors import InvalidParameters
from worker.jobs import MAX_TOP_N_TOKENS, SamplingParams
from worker.wire.parameters import (
    MAX_NEW_TOKENS,
    MAX_SEED,
    MAX_STOP_CHARACTERS,
    MAX_STOP_SEQUENCES,
    MAX_TOKEN_ID,
    MAX_TOKEN_IDS,
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
    fields = {field.name for field in msgspec.structs.fields(SamplingParams)}
    assert fields - {"prompt_log_probs"} == NAMES - {"decoder_input_details"}


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
        ({"typical_p": 0.9}, True),
        ({"min_p": 0.1}, True),
        ({"temperature": 0, "min_p": 0.1}, False),
        ({"frequency_penalty": 1, "presence_penalty": 1, "logit_bias": {"5": 1}}, False),
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


def test_vllms_way_to_have_no_top_k_and_djls_name_of_ignore_eos():
    assert read_parameters({"top_k": -1}) == read_parameters({"top_k": 0})
    assert read_parameters({"ignore_eos_token": True}) == read_parameters({"ignore_eos": True})
    with pytest.raises(InvalidParameters, match="parameter ignore_eos is 1"):
        read_parameters({"ignore_eos_token": 1})


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
        ("min_p", 0),
        ("min_p", 1),
        ("typical_p", 5e-324),
        ("typical_p", 1),
        ("frequency_penalty", -2),
        ("frequency_penalty", 2),
        ("presence_penalty", -2.0),
        ("presence_penalty", 2.0),
        ("min_new_tokens", 0),
        ("min_new_tokens", 30),
        ("top_n_tokens", 0),
        ("top_n_tokens", MAX_TOP_N_TOKENS),
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
        ("top_k", -2),
        ("top_k", False),
        ("top_p", 0),
        ("top_p", 1.0000001),
        ("top_p", float("nan")),
        ("repetition_penalty", 0),
        ("repetition_penalty", 9e-4),
        ("repetition_penalty", 1001),
        ("min_p", -0.001),
        ("min_p", 1.001),
        ("min_p", float("nan")),
        ("typical_p", 0),
        ("typical_p", 1.001),
        ("frequency_penalty", -2.001),
        ("presence_penalty", 2.001),
        ("presence_penalty", float("nan")),
        ("presence_penalty", True),
        ("min_new_tokens", -1),
        ("min_new_tokens", 31),
        ("min_new_tokens", 1.0),
        ("top_n_tokens", -1),
        ("top_n_tokens", MAX_TOP_N_TOKENS + 1),
        ("top_n_tokens", True),
        ("allowed_token_ids", []),
        ("allowed_token_ids", 5),
        ("allowed_token_ids", list(range(MAX_TOKEN_IDS + 1))),
        ("stop_token_ids", "5"),
        ("stop_token_ids", list(range(MAX_TOKEN_IDS + 1))),
        ("logit_bias", []),
        ("logit_bias", {str(token): 1 for token in range(MAX_TOKEN_IDS + 1)}),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
        ("seed", 10**4000),
        ("do_sample", 1),
        ("do_sample", "true"),
        ("details", 0),
        ("ignore_eos", []),
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


@pytest.mark.parametrize("name", ["allowed_token_ids", "stop_token_ids"])
def test_token_ids_at_their_limits(name):
    most = [*range(MAX_TOKEN_IDS - 1), MAX_TOKEN_ID]
    assert getattr(read_parameters({name: most}), name) == tuple(most)
    assert getattr(read_parameters({name: [7, 3, 7]}), name) == (7, 3)
    for bad in (-1, MAX_TOKEN_ID + 1, 1.0, "1", True, None, [1]):
        with pytest.raises(
            InvalidParameters, match=rf"parameter {name}\[1\] is .+; it must be a whole number"
        ):
            read_parameters({name: [0, bad]})


def test_no_stop_tokens_are_a_list_too():
    assert read_parameters({"stop_token_ids": []}) == SamplingParams()


def test_logit_bias_at_its_limits():
    most = {str(token): -100 for token in range(MAX_TOKEN_IDS - 1)} | {str(MAX_TOKEN_ID): 100}
    biases = read_parameters({"logit_bias": most}).logit_bias
    assert len(biases) == MAX_TOKEN_IDS
    assert (biases[0], biases[-1]) == ((0, -100.0), (MAX_TOKEN_ID, 100.0))
    assert read_parameters({"logit_bias": {}}) == SamplingParams()


@pytest.mark.parametrize("key", ["", "a", "-1", "1.0", " 1", "1_0", "٣", str(MAX_TOKEN_ID + 1), "9" * 5000])
def test_a_bias_for_what_is_no_token_id_is_refused(key):
    with pytest.raises(InvalidParameters, match=r"logit_bias's key is .+; it must be a whole") as caught:
        read_parameters({"logit_bias": {key: 1}})
    assert len(str(caught.value)) < 250


def test_two_biases_for_one_token_are_refused():
    with pytest.raises(InvalidParameters, match="logit_bias's key is '05'; it must be there once"):
        read_parameters({"logit_bias": {"5": 1, "05": 2}})


@pytest.mark.parametrize("bias", [-100.1, 100.1, float("inf"), float("nan"), None, "1", True])
def test_a_bias_beyond_openais_limits_is_refused(bias):
    with pytest.raises(
        InvalidParameters, match=r"parameter logit_bias\[5\] is .+; it must be a number from -100"
    ):
        read_parameters({"logit_bias": {"5": bias}})


def test_min_new_tokens_fit_into_max_new_tokens():
    assert read_parameters({"min_new_tokens": 50, "max_new_tokens": 50}).min_new_tokens == 50
    with pytest.raises(
        InvalidParameters, match="min_new_tokens is 50; it must be at most max_new_tokens, 30"
    ):
        read_parameters({"min_new_tokens": 50})


def test_decoder_input_details_ask_for_the_prompts_log_probs_and_for_details():
    assert read_parameters({"decoder_input_details": False}) == SamplingParams()
    for others in ({}, {"details": False}, {"details": True}):
        assert read_parameters({"decoder_input_details": True} | others) == SamplingParams(
            prompt_log_probs=True, details=True
        )


def test_alternatives_bring_details():
    assert read_parameters({"top_n_tokens": 3}) == SamplingParams(top_n_tokens=3, details=True)
    assert read_parameters({"top_n_tokens": 0}) == SamplingParams()


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
