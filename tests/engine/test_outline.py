"""What adapters may name is known from the configuration, before any weights are there."""

import json

import pytest
import torch

from tests import tiny
from worker.engine.adapters.adapter import Target
from worker.engine.base_model import load_base_model, load_outline
from worker.engine.cache_size import CacheShape
from worker.engine.discovery import foresee
from worker.engine.limits import EngineLimits
from worker.engine.model_runner import ModelRunner
from worker.errors import ModelError

CPU = torch.device("cpu")
MIXED = {
    "vocab_size": 272, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 160,
    "num_local_experts": 4, "num_experts_per_tok": 2, "eos_token_id": 256, "bos_token_id": None,
    "pad_token_id": 256,
}  # fmt: skip


def discovered(folder):
    base = load_base_model(folder, device=CPU)
    limits = EngineLimits(2, 64, 1, 8, torch.float32)
    return ModelRunner(base, limits, cache_shape=CacheShape(4, 32)).targets


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_what_is_foreseen_is_what_a_pass_through_the_model_finds(architecture, tmp_path):
    folder = tiny.make_base(tmp_path / "base", architecture)
    targets = discovered(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    found = foresee(load_outline(folder))
    assert found == targets
    assert any(not one.refused for one in found.values())
    assert any(one.is_head for one in found.values())


def test_a_model_with_experts_is_foreseen_too(tmp_path):
    import transformers

    transformers.MixtralConfig(architectures=["MixtralForCausalLM"], **MIXED).save_pretrained(tmp_path)
    found = foresee(load_outline(tmp_path))
    assert found["model.layers.1.self_attn.k_proj"] == Target(64, 32, shapes={"weight": (32, 64)})
    assert found["lm_head"].is_head
    assert "not supported" in found["model.layers.1.mlp.gate"].fixed


def test_an_outline_has_no_weights(tmp_path):
    outline = load_outline(tiny.make_base(tmp_path / "base"))
    assert {parameter.device.type for parameter in outline.parameters()} == {"meta"}


def test_a_model_that_is_none_is_a_model_error(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-thing"}))
    with pytest.raises(ModelError, match=f"the base model at {tmp_path} cannot be loaded"):
        load_outline(tmp_path)
