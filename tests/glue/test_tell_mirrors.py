"""The worker leaves word of its base model where mirrors look for it."""

import logging

import pytest

from adapters_sync.base_model import BaseModelFile
from adapters_sync.layout import MirrorPaths
from worker import tell_mirrors
from worker.engine.adapters.adapter import Target
from worker.settings import read_settings

TARGETS = {
    "q": Target(4, 8),
    "norm": Target(0, 0, "LayerNorm modules are not supported"),
    "embed": Target(30, 4, is_embedding=True, is_input=True),
    "head": Target(4, 30, is_head=True),
}


@pytest.fixture
def told(tmp_path):
    """Tell mirrors about TARGETS; what they read then."""

    def tell(**flags):
        folder = tmp_path / "model" / "adapters"
        settings = read_settings(environ={}, flags={"model": "hub/id", "adapters_dir": str(folder)} | flags)
        tell_mirrors.tell_mirrors(settings, TARGETS)
        file = BaseModelFile(MirrorPaths(folder))
        file.look()
        return file.model

    return tell


def test_mirrors_are_told_modules_refusals_and_the_rank(told, tmp_path):
    (tmp_path / "model").mkdir()
    model = told(max_lora_rank="32")
    assert model.modules == {"q": (4, 8), "head": (4, 30)}
    assert model.vocabularies == {"embed": (30, 4), "head": (30, 4)}
    assert model.lora_extra_vocab_size == 256
    assert model.refused == {"norm": "LayerNorm modules are not supported"}
    assert model.max_lora_rank == 32


def test_nothing_is_told_where_no_adapters_are_served_or_nothing_can_be_written(told, tmp_path):
    assert told() is None
    assert not (tmp_path / "model").exists()
    (tmp_path / "model").mkdir()
    assert told(enable_lora="false") is None
    assert not list((tmp_path / "model").iterdir())


def test_the_place_of_a_mirror_of_our_own_is_made_before_its_first_pass(told, tmp_path):
    assert told(sync="true", adapters_uri="s3://bucket/m/adapters/").modules == {"q": (4, 8), "head": (4, 30)}
    assert [path.name for path in (tmp_path / "model").iterdir()] == [".base_model.json"]


def test_a_failure_to_tell_is_a_warning(told, tmp_path, monkeypatch, caplog):
    (tmp_path / "model").mkdir()

    def full(paths, model):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tell_mirrors, "write_base_model", full)
    with caplog.at_level(logging.WARNING):
        assert told() is None
    assert "cannot tell mirrors" in caplog.text
