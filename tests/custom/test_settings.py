"""Which code runs, and what a handler's options are."""

from pathlib import Path

import pytest

from worker.custom.opening import find_entry_point
from worker.errors import ModelError, SettingsError
from worker.settings import handler_options, notes, read_settings

CUSTOM = {"LORAMILL_CUSTOM_CODE": "1", "LORAMILL_MODEL": "/m"}
ADAPTECHO = (Path(__file__).parent / "models" / "adaptecho" / "serving.properties").read_text()


def test_a_handlers_own_options_are_mistakes_only_without_it() -> None:
    text = "option.topK=5\noption.predict_timeout=7\nbatch_size=4\n"
    settings = read_settings(environ=CUSTOM, properties=text)
    assert (settings.predict_timeout_seconds, settings.batch_size) == (7, 4)
    assert notes(settings, text) == []
    with pytest.raises(SettingsError, match=r"option.topK: unknown key"):
        read_settings(environ={}, properties=text)
    with pytest.raises(SettingsError, match="topK: unknown key"):
        read_settings(environ=CUSTOM, properties="topK=5\n")


def test_options_come_from_the_file_and_the_environment_and_the_file_wins() -> None:
    environ = {"OPTION_TOPK": "1", "OPTION_ENTRYPOINT": "a.py", "OPTION_MODEL_ID": "x", "OPTION_EMPTY": ""}
    options = handler_options(environ, "option.model_id=y\nengine=Python\n")
    assert options == {"topk": "1", "entryPoint": "a.py", "model_id": "y"}
    assert read_settings(environ=CUSTOM | environ).entry_point == "a.py"


def test_djl_servings_own_properties_are_taken_as_they_are() -> None:
    settings = read_settings(environ=CUSTOM, properties=ADAPTECHO)
    assert (settings.own_entry_point, settings.enable_lora) == ("model.py", True)


def test_a_handler_that_was_named_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"entry_point: model\.py|entry_point: 'model\.py"):
        read_settings(environ={"OPTION_ENTRYPOINT": "model.py"})
    settings = read_settings(environ=CUSTOM | {"LORAMILL_ENTRY_POINT": "sub/mine.py"})
    with pytest.raises(ModelError, match=r"there is no file sub/mine\.py"):
        find_entry_point(settings, tmp_path)
    with pytest.raises(ModelError, match="no folder"):
        find_entry_point(settings, None)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.py").touch()
    assert find_entry_point(settings, tmp_path) == "sub/mine.py"


def test_djl_servings_built_in_handlers_are_the_engine(tmp_path: Path) -> None:
    settings = read_settings(environ={"OPTION_ENTRYPOINT": "djl_python.huggingface"})
    assert settings.own_entry_point is None
    assert any("djl_python.huggingface" in note for note in notes(settings))
    (tmp_path / "model.py").touch()
    built_in = read_settings(environ=CUSTOM | {"OPTION_ENTRYPOINT": "djl_python.huggingface"})
    assert find_entry_point(built_in, tmp_path) is None
    assert find_entry_point(read_settings(environ=CUSTOM), tmp_path) == "model.py"
    assert find_entry_point(read_settings(environ={}), tmp_path) is None


@pytest.mark.parametrize("path", ["/etc/evil.py", "../up.py", "a/../../b.py", "https://host/model.py", "a b"])
def test_an_entry_point_lies_in_the_models_folder(path: str) -> None:
    with pytest.raises(SettingsError, match="inside the model's folder"):
        read_settings(environ=CUSTOM | {"LORAMILL_ENTRY_POINT": path})


@pytest.mark.parametrize("option", ["option.rolling_batch=auto", "option.mpi_mode=true"])
def test_ways_of_calling_that_are_not_here_are_refused(option: str) -> None:
    name = option.partition("=")[0].removeprefix("option.")
    with pytest.raises(SettingsError, match=f"{name}: "):
        read_settings(environ=CUSTOM, properties=option)
    read_settings(environ=CUSTOM, properties="option.rolling_batch=disable\noption.mpi_mode=false\n")
    read_settings(environ=CUSTOM, properties=f"option.entryPoint=djl_python.huggingface\n{option}\n")
