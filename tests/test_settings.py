import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import Meta

from adapters_sync import errors as sync_errors
from adapters_sync.settings import Said, SyncSettings, describe, gather, known_names, read
from worker.djl_options import AS_IT_IS, IGNORED_KEYS
from worker.errors import SettingsError
from worker.settings import KNOWN_NAMES, Settings, notes, read_settings

fuzzed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    count: Annotated[int, Meta(description="How many.", ge=1, le=9, extra={"option": "count"})] = 3
    share: Annotated[float | None, Meta(gt=0, le=1)] = None
    on: bool = False
    mode: Annotated[Literal["fast", "slow"], Meta(extra={"aliases": {"quick": "fast"}})] = "slow"
    names: Annotated[tuple[str, ...], Meta(pattern=r"^[a-z]+\Z")] = ()
    place: Path | None = None
    key: Annotated[str | None, Meta(pattern="^k", extra={"secret": True})] = None


def mistakes(**given_arguments) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        read_settings(**{"environ": {}, **given_arguments})
    assert str(caught.value).splitlines() == caught.value.mistakes
    return caught.value.mistakes


def test_defaults_need_nothing():
    assert read(Sample, environ={}) == Sample()
    assert read_settings(environ={}) == Settings()


def test_flag_beats_environment_beats_option_beats_default():
    environ, options = {"LORAMILL_COUNT": "5"}, {"count": Said("option.count", "6")}
    assert read(Sample, environ=environ, flags={"count": 4}, options=options).count == 4
    assert read(Sample, environ=environ, flags={"count": None}, options=options).count == 5
    assert read(Sample, environ={}, options=options).count == 6
    assert read(Sample, environ={}).count == 3


@pytest.mark.parametrize("empty", ["", "  "])
def test_empty_text_counts_as_not_given(empty):
    assert read(Sample, environ={"LORAMILL_COUNT": empty}, flags={"mode": empty}) == Sample()


@pytest.mark.parametrize("text", ["true", "True", "TRUE", "1", "yes", "YES", " yes "])
def test_every_word_for_true(text):
    assert read(Sample, environ={"LORAMILL_ON": text}).on is True


@pytest.mark.parametrize("text", ["false", "False", "0", "no", "No"])
def test_every_word_for_false(text):
    assert read(Sample, environ={"LORAMILL_ON": text}).on is False
    assert read(Sample, environ={"LORAMILL_ON": "1"}, flags={"on": False}).on is False


def test_values_of_every_kind():
    environ = {
        "LORAMILL_SHARE": "0.5",
        "LORAMILL_MODE": "QUICK",
        "LORAMILL_NAMES": "a, b,,c",
        "LORAMILL_PLACE": "/x/y",
        "LORAMILL_KEY": "key",
    }
    expected = Sample(share=0.5, mode="fast", names=("a", "b", "c"), place=Path("/x/y"), key="key")
    assert read(Sample, environ=environ) == expected
    assert read(Sample, environ={}, flags={"names": ["a", "b"]}).names == ("a", "b")


@pytest.mark.parametrize("text", ["1", "9"])
def test_limits_are_inclusive(text):
    assert read(Sample, environ={"LORAMILL_COUNT": text}).count == int(text)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("COUNT", "0", "at least 1 and at most 9"),
        ("COUNT", "10", "at least 1 and at most 9"),
        ("COUNT", "1.0", "a whole number"),
        ("COUNT", "true", "a whole number"),
        ("COUNT", "1_0", "a whole number"),
        ("COUNT", "9" * 5000, "a whole number"),
        ("SHARE", "0", "above 0 and at most 1"),
        ("SHARE", "1.01", "above 0 and at most 1"),
        ("SHARE", "nan", "a number"),
        ("SHARE", "inf", "a number"),
        ("ON", "on", "true or false (1, 0, yes, no)"),
        ("MODE", "medium", "one of fast, slow"),
        ("NAMES", "a,B", "of the form"),
        ("PLACE", "~no-such-user-at-all/x", "home folder"),
    ],
)
def test_a_mistake_names_setting_origin_value_and_limit(name, text, words):
    with pytest.raises(sync_errors.SettingsError) as caught:
        read(Sample, environ={f"LORAMILL_{name}": text})
    (mistake,) = caught.value.mistakes
    assert mistake.startswith(f"{name.lower()}: {text!r} (from LORAMILL_{name})")
    assert words in mistake


def test_all_mistakes_come_together_and_the_struct_keeps_defaults_meanwhile():
    reading = gather(Sample, environ={"LORAMILL_COUNT": "x", "LORAMILL_KOUNT": "1"}, flags={"mode": "no"})
    assert len(reading.mistakes) == 3
    assert reading.refused == {"count", "mode"}
    assert reading.values["count"] == 3


def test_secrets_stay_out_of_messages():
    reading = gather(Sample, environ={"LORAMILL_KEY": "sesame"})
    assert len(reading.mistakes) == 1
    assert "sesame" not in reading.mistakes[0]
    assert "sesame" not in repr(Settings(http_token="sesame", max_loras=9))
    assert "max_loras=9" in repr(Settings(http_token="sesame", max_loras=9))


def test_unknown_variable_names_the_nearest_known_one():
    (mistake,) = mistakes(environ={"LORAMILL_MAX_LORA": "4"})
    assert mistake.startswith("LORAMILL_MAX_LORA: unknown setting (from the environment)")
    assert mistake.endswith("the nearest known one is LORAMILL_MAX_LORAS")


def test_variables_of_the_programs_other_processes_are_known():
    environ = {"LORAMILL_MAX_LORAS": "8", "LORAMILL_SETTLE_SECONDS": "5"}
    assert read(SyncSettings, environ=environ, known=KNOWN_NAMES).settle_seconds == 5
    with pytest.raises(sync_errors.SettingsError, match="LORAMILL_MAX_LORAS"):
        read(SyncSettings, environ=environ)
    assert known_names(SyncSettings) < KNOWN_NAMES


def test_kubernetes_service_links_are_not_settings():
    environ = {
        "LORAMILL_PORT": "tcp://10.0.0.1:8080",
        "LORAMILL_SERVICE_HOST": "10.0.0.1",
        "LORAMILL_SERVICE_PORT_METRICS": "8080",
        "LORAMILL_API_SERVICE_PORT": "8080",
        "LORAMILL_API_PORT_8080_TCP_ADDR": "10.0.0.1",
    }
    assert read_settings(environ=environ) == Settings()
    assert mistakes(environ={"LORAMILL_HTP_PORT": "80"})


def test_a_flag_without_a_field_is_a_programmers_error():
    with pytest.raises(TypeError, match="no_such"):
        read(Sample, environ={}, flags={"no_such": 1})


def test_describe_says_all_that_docs_and_command_line_need():
    info = describe(Sample)[0]
    said = (info.name, info.env, info.flag, info.kind, info.type, info.default)
    assert said == ("count", "LORAMILL_COUNT", "--count", int, "a whole number", 3)
    assert (info.help, info.limits, info.option) == ("How many.", "at least 1 and at most 9", "count")
    assert describe(Sample)[3].allowed == ("fast", "slow")


def test_every_setting_has_help_and_a_default_that_it_would_accept():
    for info in describe(Settings):
        assert info.help.endswith("."), info.name
        if info.default not in {None, ()}:
            assert read_settings(environ={info.env: str(info.default)}) == Settings(), info.name


def test_flag_of_exit_when_idle_is_the_specs():
    flags = {info.name: info.flag for info in describe(Settings)}
    assert flags["exit_when_idle_seconds"] == "--exit-when-idle"
    assert flags["max_num_seqs"] == "--max-num-seqs"


@fuzzed
@given(st.dictionaries(st.sampled_from(sorted(KNOWN_NAMES)), st.text(), max_size=8), st.text())
def test_no_text_raises_anything_but_a_settings_error(environ, properties):
    try:
        notes(read_settings(environ=environ, properties=properties), properties)
    except SettingsError as error:
        found = error.mistakes
    else:
        found = ["none"]
    assert found


# Options


def test_file_wins_over_option_variables_and_settings_win_over_both():
    properties = "option.max_loras=6\noption.enable_lora=1\n"
    environ = {"OPTION_MAX_LORAS": "5", "OPTION_MAX_LORA_RANK": "32"}
    settings = read_settings(environ=environ, properties=properties)
    assert (settings.max_loras, settings.max_lora_rank, settings.enable_lora) == (6, 32, True)
    assert read_settings(environ={**environ, "LORAMILL_MAX_LORAS": "7"}, properties=properties).max_loras == 7
    assert read_settings(environ=environ, flags={"max_loras": 8}, properties=properties).max_loras == 8


def test_empty_option_variables_are_skipped():
    assert read_settings(environ={"OPTION_MAX_LORAS": "", "OPTION_NO_SUCH": ""}) == Settings()


def test_an_empty_option_in_the_file_does_not_hide_the_environment():
    settings = read_settings(environ={"OPTION_MAX_LORAS": "5"}, properties="option.max_loras=\n")
    assert settings.max_loras == 5


def test_java_properties_syntax_is_read_by_a_library():
    properties = "# comment\noption.max_loras : 6\noption.dtype \\\n  bf16\noption.model_id=s3\\://b-b/m\n"
    settings = read_settings(environ={}, properties=properties)
    assert (settings.max_loras, settings.dtype, settings.model_id) == (6, "bfloat16", "s3://b-b/m")


def test_a_file_that_is_not_java_properties_is_a_mistake():
    (mistake,) = mistakes(properties="option.max_loras=\\uZZZZ\n")
    assert "not a Java properties file" in mistake


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("option.max_lora=4", "option.max_loras"),
        ("option.MAX_LORAS=4", "option."),
        ("option.batchSize=4", "batchSize"),
        ("max_loras=4", "option.max_loras"),
        ("minWorker=4", "minWorkers"),
    ],
)
def test_unknown_key_names_the_nearest_known_one(text, near):
    (mistake,) = mistakes(properties=text)
    assert f"the nearest known one is {near}" in mistake


@pytest.mark.parametrize("name", ["OPTION_MAX_LORA", "OPTION_max_loras", "OPTION_"])
def test_unknown_option_variable_names_the_nearest_known_one(name):
    (mistake,) = mistakes(environ={name: "4"})
    assert "the nearest known one is OPTION_" in mistake


def test_a_bad_option_names_its_place():
    (mistake,) = mistakes(properties="option.max_rolling_batch_size=0")
    assert mistake.startswith("max_num_seqs: '0' (from option.max_rolling_batch_size in serving.properties)")


def test_keys_that_size_djls_workers_are_noted_and_not_swallowed():
    properties = "engine=Python\nbatchSize=4\ngpu.maxWorkers=1\n"
    settings = read_settings(environ={}, properties=properties)
    assert len(notes(settings, properties)) == 2
    assert notes(settings, "engine=MPI") == []
    everything = "\n".join(f"{key}=1" for key in IGNORED_KEYS)
    assert read_settings(environ={}, properties=everything) == Settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tensor_parallel_degree", "65"),
        ("tensor_parallel_degree", "most"),
        ("long_lora_scaling_factors", "0.5"),
    ],
)
def test_what_this_version_does_not_do_is_refused(name, value):
    (mistake,) = mistakes(properties=f"option.{name}={value}")
    assert mistake.startswith(f"{name}: '{value}'")


GUIDES = """
engine=Python
option.rolling_batch=vllm
option.async_mode=true
option.tensor_parallel_degree=max
option.max_rolling_batch_size=32
option.max_rolling_batch_prefill_tokens=4096
option.task=text-generation
option.adapters=adapters
option.enable_lora=true
option.output_formatter=json
log_request_metric=true
"""


def test_what_djls_guides_recommend_starts_a_worker_and_is_told_of():
    settings = read_settings(environ={"OPTION_MPI_MODE": "true"}, properties=GUIDES)
    assert (settings.tensor_parallel_degree, settings.max_num_batched_tokens) == (0, 4096)
    told = "\n".join(notes(settings, GUIDES, {"OPTION_MPI_MODE": "true"}))
    for name in ("rolling_batch", "async_mode", "task", "adapters", "output_formatter", "mpi_mode"):
        assert f"option {name} chooses among DJL Serving's ways and changes nothing here" in told
    assert "log_request_metric in serving.properties" in told
    assert "max_rolling" not in told


@pytest.mark.parametrize("name", sorted(AS_IT_IS))
def test_other_values_of_those_options_are_refused(name):
    (mistake,) = mistakes(properties=f"option.{name}=Something")
    assert mistake.startswith(f"option.{name}: 'Something' is not what is done here; it must be ")
    (mistake,) = mistakes(environ={f"OPTION_{name.upper()}": "Something"})
    assert mistake.startswith(f"OPTION_{name.upper()}: 'Something'")
    for value in AS_IT_IS[name]:
        assert read_settings(environ={}, properties=f"option.{name}={value.upper()}") == Settings()


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ("gpu_memory_utilization", "LORAMILL_MEMORY_SHARE"),
        ("max_num_seqs", "LORAMILL_MAX_NUM_SEQS"),
        ("revision", "LORAMILL_MODEL, as a folder"),
    ],
)
def test_options_that_have_another_place_here_are_told_it(option, instead):
    for said in ({"properties": f"option.{option}=1"}, {"environ": {f"OPTION_{option.upper()}": "1"}}):
        (mistake,) = mistakes(**said)
        assert f"what there is instead is {instead}" in mistake


def test_the_variables_of_djls_starting_guide():
    environ = {"HF_MODEL_ID": "s3://bucket/llama/", "TENSOR_PARALLEL_DEGREE": "max"}
    settings = read_settings(environ={**environ, "HF_MODEL_TRUST_REMOTE_CODE": "True"})
    assert (settings.model, settings.tensor_parallel_degree) == ("s3://bucket/llama/", 0)
    assert settings.trust_remote_code
    over = {**environ, "OPTION_TENSOR_PARALLEL_DEGREE": "2", "LORAMILL_MODEL_ID": "there"}
    settings = read_settings(environ=over)
    assert (settings.model_id, settings.tensor_parallel_degree) == ("there", 2)
    (mistake,) = mistakes(environ={"TENSOR_PARALLEL_DEGREE": "-1"})
    assert mistake.startswith("tensor_parallel_degree: '-1' (from TENSOR_PARALLEL_DEGREE)")


def test_adapters_in_s3_that_nobody_here_mirrors_are_told_of():
    settings = read_settings(environ={"LORAMILL_MODEL": "s3://bucket/llama/"})
    (told,) = notes(settings)
    assert "does not mirror s3://bucket/llama/adapters/" in told
    assert "loramill sync" in told
    assert notes(msgspec.structs.replace(settings, sync=True)) == []
    assert notes(msgspec.structs.replace(settings, enable_lora=False)) == []


def test_the_model_may_have_a_name_of_its_own():
    assert read_settings(environ={"LORAMILL_MODEL": "s3://bucket/llama/"}).model_name == "llama"
    environ = {"LORAMILL_MODEL": "s3://bucket/llama/", "LORAMILL_SERVED_MODEL_NAME": "test"}
    assert read_settings(environ=environ).model_name == "test"
    (mistake,) = mistakes(environ={"LORAMILL_SERVED_MODEL_NAME": "a/b"})
    assert "1 to 128 letters, digits" in mistake


def test_neutral_values_of_what_this_version_does_not_do_are_accepted():
    properties = "option.tensor_parallel_degree=1\noption.fully_sharded_loras=no\n"
    assert read_settings(environ={}, properties=properties).fully_sharded_loras is False


@pytest.mark.parametrize("said", ["4,3.0", "(3.0, 4.0)", "(3.0,4.0,)", "3,4.0,3"])
def test_scaling_factors_are_written_as_djl_s_users_write_them(said):
    settings = read_settings(environ={}, properties=f"option.long_lora_scaling_factors={said}")
    assert settings.rope_factors == (3.0, 4.0)


@pytest.mark.parametrize("said", ["(3.0", "3.0)", "0", "-2", "1001", "nan", "3;4", "()", "3,,4"])
def test_what_is_no_scaling_factor_is_a_mistake(said):
    (mistake,) = mistakes(properties=f"option.long_lora_scaling_factors={said}")
    assert mistake.startswith(f"long_lora_scaling_factors: '{said}'")
    assert "numbers from 1 to 1000" in mistake


# Cross-checks and derived values


def test_cpu_loras_are_at_least_max_loras():
    assert read_settings(environ={"LORAMILL_MAX_CPU_LORAS": "4"}).cpu_loras == 4
    assert read_settings(environ={"LORAMILL_MAX_LORAS": "9"}).cpu_loras == 9
    (mistake,) = mistakes(environ={"LORAMILL_MAX_CPU_LORAS": "3"})
    assert "3 (from LORAMILL_MAX_CPU_LORAS) must be at least max_loras, 4 (from the default)" in mistake


def test_a_refused_value_is_not_cross_checked():
    assert len(mistakes(environ={"LORAMILL_MAX_CPU_LORAS": "3", "LORAMILL_MAX_LORAS": "x"})) == 1


def test_a_step_has_room_for_a_token_of_every_row():
    assert read_settings(flags={"max_num_seqs": 2048}, environ={}).max_num_seqs == 2048
    assert "max_num_batched_tokens" in mistakes(flags={"max_num_seqs": 2049})[0]


@pytest.mark.parametrize("mode", ["auto", "merged"])
def test_nothing_is_merged_into_a_model_that_devices_share(mode):
    environ = {"OPTION_TENSOR_PARALLEL_DEGREE": "2", "LORAMILL_LORA_MODE": mode}
    (mistake,) = mistakes(environ=environ)
    assert mistake == (
        f"lora_mode: {mode} (from LORAMILL_LORA_MODE) must be unmerged with tensor_parallel_degree "
        "2 (from OPTION_TENSOR_PARALLEL_DEGREE), above 1"
    )
    assert read_settings(environ={"LORAMILL_LORA_MODE": mode}).lora_mode == mode
    unmerged = read_settings(environ={**environ, "LORAMILL_LORA_MODE": "unmerged"})
    assert unmerged.tensor_parallel_degree == 2


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_loopback_needs_no_token(host):
    assert read_settings(environ={"LORAMILL_HTTP_HOST": host}).http_host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "worker.local"])
def test_other_addresses_need_a_token(host):
    assert "http_token" in mistakes(environ={"LORAMILL_HTTP_HOST": host})[0]
    settings = read_settings(environ={"LORAMILL_HTTP_HOST": host, "LORAMILL_HTTP_TOKEN": "t"})
    assert settings.http_token == "t"


@pytest.mark.parametrize("uri", ["s3://bucket/", "s3://bucket/results/", "s3://b.ucket/a/b-c/"])
def test_output_prefixes_end_with_a_slash(uri):
    assert read_settings(flags={"output_prefixes": [uri]}, environ={}).output_prefixes == (uri,)


@pytest.mark.parametrize(
    "uri", ["s3://bucket", "s3://bucket/results", "bucket/", "s3://bucket//", "s3://bucket/../", "s3://Bu/a/"]
)
def test_other_output_prefixes_are_refused(uri):
    (mistake,) = mistakes(environ={"LORAMILL_OUTPUT_PREFIXES": f"s3://bucket/ok/,{uri}"})
    assert "ends with a slash" in mistake


@pytest.mark.parametrize("uri", ["s3://bucket/", "s3://bucket/m/adapters", "s3://bucket/./adapters/"])
def test_adapters_uri_is_a_folder_in_a_bucket(uri):
    assert "adapters_uri" in mistakes(environ={"LORAMILL_ADAPTERS_URI": uri})[0]


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
def test_devices(device):
    assert read_settings(environ={"LORAMILL_DEVICE": device}).device == device


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:1\nx", "mps"])
def test_other_devices_are_refused(device):
    assert "auto, cpu, cuda or cuda:<number>" in mistakes(environ={"LORAMILL_DEVICE": device})[0]


@pytest.mark.parametrize("url", ["queue", "ftp://host/q", "https://host", "https://host/a b"])
def test_queue_url_is_http(url):
    assert "queue_url" in mistakes(environ={"LORAMILL_QUEUE_URL": url})[0]


@pytest.mark.parametrize("url", ["queue", "s3://bucket/q", "https://host", "https://host/a b"])
def test_the_queue_of_events_is_http(url):
    (mistake,) = mistakes(environ={"LORAMILL_ADAPTERS_EVENTS_QUEUE_URL": url})
    assert mistake == (
        f"adapters_events_queue_url: {url!r} (from LORAMILL_ADAPTERS_EVENTS_QUEUE_URL) must be "
        "the http(s) URL of a queue"
    )


def test_the_queue_of_events_is_not_that_of_the_jobs():
    environ = {"LORAMILL_QUEUE_URL": "https://host/1/jobs"}
    flags = {"adapters_events_queue_url": "https://host/1/jobs"}
    (mistake,) = mistakes(environ=environ, flags=flags)
    said = "https://host/1/jobs (from --adapters-events-queue-url) must not be queue_url"
    assert mistake == f"adapters_events_queue_url: {said}"
    flags = {"adapters_events_queue_url": "https://host/1/events"}
    assert read_settings(environ=environ, flags=flags).adapters_events_queue_url == "https://host/1/events"
    assert read_settings(environ={}).adapters_events_queue_url is None


@pytest.mark.parametrize(("text", "good"), [("9", False), ("10", True), ("43200", True), ("43201", False)])
def test_visibility_timeout_lies_within_sqs_limits(text, good):
    environ = {"LORAMILL_VISIBILITY_TIMEOUT_SECONDS": text}
    if good:
        assert read_settings(environ=environ).heartbeat_seconds == int(text) / 3
    else:
        assert "at least 10 and at most 43200" in mistakes(environ=environ)[0]


def test_rows_in_flight_follow_the_batch():
    assert read_settings(environ={"LORAMILL_MAX_NUM_SEQS": "3"}).in_flight_rows == 12
    assert read_settings(environ={"LORAMILL_MAX_IN_FLIGHT_ROWS": "5"}).in_flight_rows == 5


def test_dead_letters_go_below_the_first_output_prefix():
    assert Settings().dead_letter_prefix is None
    assert Settings(output_prefixes=("s3://b/x/", "s3://b/y/")).dead_letter_prefix == "s3://b/x/dead-letter/"
    assert Settings(dead_letter_uri="s3://b/d/").dead_letter_prefix == "s3://b/d/"


def test_require_names_variable_and_flag():
    assert Settings().require("queue_url", "model", "output_prefixes") == [
        "queue_url: required, and not set; set LORAMILL_QUEUE_URL or --queue-url",
        "model: required, and not set; set LORAMILL_MODEL or --model",
        "output_prefixes: required, and not set; set LORAMILL_OUTPUT_PREFIXES or --output-prefixes",
    ]
    assert Settings(model="m").require("model", "http_port") == []


def test_model_id_stands_in_for_model_and_wins_as_the_place_of_the_weights():
    alone = read_settings(environ={"OPTION_MODEL_ID": "org/name"})
    assert (alone.model, alone.weights, alone.require("model")) == ("org/name", "org/name", [])
    both = read_settings(environ={"LORAMILL_MODEL": "/srv/m"}, properties="option.model_id=s3://bucket/m")
    assert (both.model, both.weights) == ("/srv/m", "s3://bucket/m")
    assert both.mirror_uri == "s3://bucket/m/adapters/"
    assert both.adapters_path == Path("/srv/m/adapters")


@pytest.mark.parametrize("model", ["s3://bucket/m", "s3://bucket/m/"])
def test_an_s3_model_implies_where_adapters_are(model):
    settings = read_settings(environ={"LORAMILL_MODEL": model, "LORAMILL_CACHE_DIR": "/c"})
    assert (settings.model_uri, settings.mirror_uri) == ("s3://bucket/m/", "s3://bucket/m/adapters/")
    assert settings.adapters_path == Path("/c/s3/bucket/m/adapters")
    assert settings.model_dir is None


def test_each_mirrored_prefix_gets_a_parent_folder_of_its_own():
    cache = Path("/c")
    one = SyncSettings(adapters_uri="s3://bucket/x/", cache_dir=cache).adapters_path
    two = SyncSettings(adapters_uri="s3://bucket/y/", cache_dir=cache).adapters_path
    assert one.name == two.name == "adapters"
    assert one.parent != two.parent


@pytest.mark.parametrize("model", ["s3://bucket/../m", "s3://bucket/m/..", "s3://bucket//m", "s3:///m"])
def test_an_s3_model_cannot_lead_out_of_the_cache(model):
    assert "model" in mistakes(environ={"LORAMILL_MODEL": model})[0]


def test_hub_ids_and_folders_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = SyncSettings(model="org/name", cache_dir=Path("/c"))
    assert (hub.model_dir, hub.mirror_uri) == (None, None)
    assert hub.adapters_path == Path("/c/hub/org/name/adapters")
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert hub.model_dir == Path("org/name")
    assert SyncSettings(model="./absent").model_dir == Path("absent")
    assert SyncSettings(model="a/../../b").model_dir == Path("a/../../b")
    assert SyncSettings().adapters_path is None


def test_adapters_imply_lora_unless_it_is_said_to_be_off(tmp_path):
    assert not Settings().lora_enabled
    assert Settings(adapters_dir=tmp_path).lora_enabled
    assert Settings(model="s3://bucket/m").lora_enabled
    assert not Settings(model=str(tmp_path)).lora_enabled
    (tmp_path / "adapters").mkdir()
    assert Settings(model=str(tmp_path)).lora_enabled
    off = Settings(adapters_dir=tmp_path, enable_lora=False)
    assert not off.lora_enabled
    assert len(notes(off)) == 1


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("s3://bucket/llama/", "llama"),
        ("s3://bucket/a/b", "b"),
        ("org/name", "name"),
        ("/srv/models/base/", "base"),
    ],
)
def test_the_model_has_the_last_part_of_its_address_as_name(model, name):
    assert read_settings(environ={}, flags={"model": model}).model_name == name


def test_a_model_in_the_current_folder_has_that_folders_name(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path / "base")
    settings = read_settings(environ={}, flags={"model": "."})
    assert (settings.model_name, settings.model_names) == ("base", ("base", "."))


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("s3://bucket/llama/", ("llama", "s3://bucket/llama/")),
        ("meta/llama", ("llama", "meta/llama")),
        ("llama", ("llama",)),
    ],
)
def test_a_model_is_called_by_its_name_or_as_the_setting_says(model, names):
    assert read_settings(environ={}, flags={"model": model}).model_names == names


def test_registered_adapters_of_each_adapters_folder_have_a_place_of_their_own_in_the_cache(tmp_path):
    def place(**flags: str) -> Path | None:
        return read_settings(environ={}, flags={"cache_dir": str(tmp_path), **flags}).registered_path

    places = {
        place(model="s3://bucket/llama/"),
        place(model="s3://other/llama/"),
        place(model="/srv/llama"),
        place(model="/srv/llama", adapters_dir="/data/adapters"),
    }
    assert len({found.parent for found in places if found}) == 4
    assert all(found and found.is_relative_to(tmp_path / "registered") for found in places)
    assert place(model="/srv/llama/") == place(model="/srv/llama")
    assert place() is None


def test_the_default_cache_is_below_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Settings().cache_path == tmp_path / ".cache" / "loramill"
    assert read_settings(environ={"LORAMILL_CACHE_DIR": "~/c"}).cache_path == tmp_path / "c"


def test_settings_import_neither_torch_nor_aws():
    code = (
        "import sys\n"
        "for name in ('torch', 'boto3', 'botocore', 'aioboto3', 'transformers'): sys.modules[name] = None\n"
        "import worker.settings, worker.wire"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
