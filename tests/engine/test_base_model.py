"""A base model is served right or refused with the reason."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests import tiny
from worker.engine.attention import PackedAttention
from worker.engine.base_model import load_base_model, resolve_device, resolve_dtype
from worker.engine.cache_size import CacheShape
from worker.engine.limits import EngineLimits
from worker.engine.model_runner import ModelRunner
from worker.engine.proof import expect
from worker.errors import ModelError

CPU = torch.device("cpu")


def limits(max_num_seqs):
    return EngineLimits(max_num_seqs, 64, 4, 64, torch.float32)


SMALL = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "eos_token_id": 256,
    "bos_token_id": None,
    "pad_token_id": 256,
    "initializer_range": 0.4,
}


def save(folder, config, model_class=None):
    torch.manual_seed(0)
    model = model_class(config) if model_class else AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def load(folder, **options):
    return load_base_model(folder, device=CPU, **options)


@pytest.fixture
def copy(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "base")


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Architectures

REFUSED = {
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}, "BloomForCausalLM does not use .* interface"),
    "mamba": ("MambaConfig", {"state_size": 4}, "MambaForCausalLM does not use .* interface"),
    "lfm2": (
        "Lfm2Config",
        {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
        "layers of type conv",
    ),
    "sinks": (
        "GptOssConfig",
        {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4},
        "needs s_aux, which is not supported",
    ),
    "bidirectional": (
        "Gemma3TextConfig",
        {"head_dim": 16, "sliding_window": 5, "use_bidirectional_attention": True},
        "packed logits differ from its own",
    ),
    "own-positions": (
        "Llama4TextConfig",
        {
            "head_dim": 16,
            "intermediate_size_mlp": 32,
            "num_local_experts": 2,
            "layer_types": ["full_attention"] * 2,
            "no_rope_layers": [1, 0],
        },
        "attn_temperature_tuning, which is not supported",
    ),
    "encoder": ("BertConfig", {}, "packed logits differ from its own"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_model_that_would_be_served_wrong_is_refused(kind, tmp_path):
    name, settings, reason = REFUSED[kind]
    folder = save(tmp_path, getattr(transformers, name)(**{**SMALL, **settings}))
    with pytest.raises(ModelError, match=reason):
        ModelRunner(load(folder), limits(2))


def test_encoder_decoder_model_is_refused(tmp_path):
    config = transformers.T5Config(vocab_size=272, d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=8)
    save(tmp_path, config, transformers.T5ForConditionalGeneration)
    with pytest.raises(ModelError, match="T5Config"):
        load(tmp_path)


def test_quantised_model_is_refused(copy, monkeypatch):
    monkeypatch.setattr(transformers.LlamaForCausalLM, "hf_quantizer", object(), raising=False)
    with pytest.raises(ModelError, match="quantised"):
        load(copy)


# Files


def test_missing_folder_is_refused_by_its_path(tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_refused(name, copy):
    (copy / name).unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(copy)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_truncated_file_is_refused(name, copy):
    path = copy / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(copy)


def test_model_of_an_unknown_type_is_refused(copy):
    change_config(copy, model_type="of-tomorrow")
    with pytest.raises(ModelError, match="of-tomorrow"):
        load(copy)


def test_checkpoint_that_lacks_weights_is_refused(copy):
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load(copy)


def test_checkpoint_of_another_shape_is_refused(copy):
    change_config(copy, intermediate_size=96)
    with pytest.raises(ModelError):
        load(copy)


# Length


def test_length_is_the_models_limit_unless_less_is_wanted(llama):
    assert load(llama).max_model_len == 160
    assert load(llama, max_model_len=100).max_model_len == 100
    assert load(llama, max_model_len=160).max_model_len == 160


def test_length_above_the_models_limit_is_refused_with_both_numbers(llama):
    with pytest.raises(ModelError, match="max_model_len is 161, the base model's limit is 160"):
        load(llama, max_model_len=161)


LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 32,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 40}


@pytest.mark.parametrize(
    ("config", "settings", "limit"),
    [
        ("Phi3Config", {"rope_parameters": LONG, "original_max_position_embeddings": 32}, 32),
        ("LlamaConfig", {"rope_parameters": LONG}, 32),
        ("LlamaConfig", {"rope_parameters": DYNAMIC}, 160),
        ("LlamaConfig", {"rope_parameters": YARN}, 160),
        (
            "Gemma3TextConfig",
            {
                "head_dim": 16,
                "sliding_window": 5,
                "rope_parameters": {
                    "full_attention": LONG,
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                },
            },
            32,
        ),
    ],
    ids=["longrope-phi3", "longrope", "dynamic", "yarn", "longrope-of-a-layer-type"],
)
def test_rotary_scaling_that_depends_on_the_batch_caps_the_length(config, settings, limit, tmp_path):
    folder = save(tmp_path, getattr(transformers, config)(**{**SMALL, **settings}))
    assert load(folder).max_model_len == limit
    with pytest.raises(ModelError, match=f"limit is {limit}"):
        load(folder, max_model_len=limit + 1)


@pytest.mark.parametrize("length", [2, 8, 12, 20])
def test_short_max_model_len_with_one_row_is_served(length, llama):
    runner = ModelRunner(load(llama, max_model_len=length), limits(1))
    assert runner.cache_shape == CacheShape(1, length)


def test_sequence_that_never_fits_the_memory_is_refused_with_the_numbers(llama, monkeypatch):
    base = load(llama)
    memory = type("Memory", (), {"available": 1000})
    monkeypatch.setattr("worker.engine.base_model.psutil.virtual_memory", memory)
    with pytest.raises(
        ModelError, match=r"max_model_len 160 needs \d+ MiB .* memory_share 0.4 of what is free"
    ):
        ModelRunner(base, limits(2))


def test_weights_that_do_not_fit_are_refused_before_they_are_read(llama, monkeypatch):
    monkeypatch.setattr(
        "worker.engine.base_model.psutil.virtual_memory", type("", (), {"available": 100 << 10})
    )
    with pytest.raises(ModelError, match=r"weights need \d+ MiB in torch.float32, 0 MiB are free on cpu"):
        load(llama)


def test_memory_share_is_the_most_the_cache_takes(llama, monkeypatch):
    base = load(llama)
    free = 64 << 20
    monkeypatch.setattr("worker.engine.base_model.psutil.virtual_memory", type("", (), {"available": free}))
    sizes = [ModelRunner(load(llama), limits(4000), memory_share=share).cache_bytes for share in (0.1, 0.5)]
    assert sizes[0] <= 0.1 * free < sizes[1] <= 0.5 * free
    with pytest.raises(ModelError, match=r"memory_share 0.001 of what is free"):
        ModelRunner(base, limits(2), memory_share=0.001)


def test_scarce_memory_is_cut_into_small_blocks(llama, monkeypatch):
    base = load(llama)
    per_token = ModelRunner(base, limits(1), cache_shape=CacheShape(1, 160)).cache_bytes // 160
    base = load(llama)
    memory = type("Memory", (), {"available": per_token * 400 / 0.4})
    monkeypatch.setattr("worker.engine.base_model.psutil.virtual_memory", memory)
    runner = ModelRunner(base, limits(8))
    assert runner.cache_shape.block_size < 160
    assert 160 <= runner.cache_shape.num_blocks * runner.cache_shape.block_size <= 400
    assert runner.cache_bytes <= per_token * 400


# Types


@pytest.mark.parametrize(
    ("own", "expected"),
    [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (torch.float16, torch.float32)],
)
def test_auto_is_bfloat16_on_a_processor_that_has_it(own, expected, monkeypatch):
    monkeypatch.setattr("worker.engine.base_model.has_bfloat16", lambda _: True)
    assert resolve_dtype("auto", CPU, transformers.LlamaConfig(dtype=own)) == expected


@pytest.mark.parametrize(
    ("name", "own", "device", "expected"),
    [
        ("float32", torch.bfloat16, "cuda", torch.float32),
        ("bfloat16", torch.float32, "cpu", torch.bfloat16),
        ("float16", None, "cpu", torch.float16),
        ("auto", torch.bfloat16, "cuda", torch.bfloat16),
        ("auto", torch.float16, "cuda", torch.float16),
        ("auto", torch.bfloat16, "cpu", torch.float32),
        ("auto", None, "cuda", torch.float32),
        ("auto", torch.float64, "cuda", torch.float32),
    ],
)
def test_dtype_is_as_asked_or_what_the_device_is_good_at(name, own, device, expected, monkeypatch):
    monkeypatch.setattr("worker.engine.base_model.has_bfloat16", lambda _: False)
    config = transformers.LlamaConfig(dtype=own)
    assert resolve_dtype(name, torch.device(device), config) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_model_is_loaded_in_its_dtype(dtype, llama):
    base = load(llama, dtype=dtype)
    assert (
        {parameter.dtype for parameter in base.model.parameters()} == {getattr(torch, dtype)} == {base.dtype}
    )
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.training
    ModelRunner(base, limits(1))


def test_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ModelError, match="cuda:1 is not there: 1 CUDA devices"):
        resolve_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == CPU
    with pytest.raises(ModelError, match="cuda is not there"):
        resolve_device("cuda")


def test_end_of_text_is_the_generation_configs_else_the_tokenizers(copy):
    path = copy / "generation_config.json"
    for ids, expected in [(7, {7}), ([7, 9], {7, 9}), (None, {256})]:
        path.write_text(json.dumps({"eos_token_id": ids}))
        if ids is None:
            change_config(copy, eos_token_id=None)
        assert load(copy).eos_token_ids == expected


# The probe


@pytest.mark.parametrize("ignored", ["scaling", "sliding_window", "softcap"])
def test_attention_that_ignores_what_the_model_passes_is_found_out(ignored, tmp_path, monkeypatch):
    folder = tiny.make_base(tmp_path, "gemma2")
    change_config(folder, query_pre_attn_scalar=64, attn_logit_softcapping=0.5)
    ModelRunner(load(folder), limits(1))
    right = PackedAttention.__call__

    def wrong(self, module, query, key, value, attention_mask=None, **options):
        return right(self, module, query, key, value, attention_mask, **{**options, ignored: None})

    monkeypatch.setattr(PackedAttention, "__call__", wrong)
    with pytest.raises(ModelError, match=r"packed logits differ|does not tell its window"):
        ModelRunner(load(folder), limits(1))


@pytest.mark.parametrize(
    "extra", [{"bias": torch.ones(3)}, {"bias": [1, 2]}, {"is_causal": False}, {"dropout": 0.5}], ids=str
)
def test_attention_that_needs_more_than_we_know_is_refused_by_its_name(extra, llama, monkeypatch):
    right = PackedAttention.__call__
    monkeypatch.setattr(
        PackedAttention, "__call__", lambda *given, **options: right(*given, **{**options, **extra})
    )
    with pytest.raises(ModelError, match=f"needs {next(iter(extra))}, which is not supported"):
        ModelRunner(load(llama), limits(1))


def test_model_whose_own_code_fails_is_refused_with_what_it_said(llama, monkeypatch):
    def broken(*_args, **_kwargs):
        raise RuntimeError("sizes 4 and 8 do not match")

    base = load(llama)
    monkeypatch.setattr(base.model.model.layers[1].self_attn, "forward", broken)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot be served.*sizes 4 and 8 do not match"):
        ModelRunner(base, limits(1))


def test_layer_that_attends_by_other_means_is_found_out(llama, monkeypatch):
    base = load(llama)
    attention = base.model.model.layers[1].self_attn
    monkeypatch.setattr(
        attention, "forward", lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
    )
    with pytest.raises(ModelError, match="3 layers, of which 2"):
        ModelRunner(base, limits(1))


def test_sliding_layer_that_does_not_tell_its_window_is_refused(tmp_path):
    folder = tiny.make_base(tmp_path, "qwen2-window")
    base = load(folder)
    for layer in base.model.model.layers:
        layer.self_attn.sliding_window = None
    with pytest.raises(ModelError, match="window"):
        ModelRunner(base, limits(1))


def test_several_engines_live_in_one_process(llama, tmp_path):
    other = tiny.make_base(tmp_path, "gpt2")
    names = {ModelRunner(load(folder), limits(1))._attention.name for folder in (llama, other, llama)}
    assert len(names) == 3


def test_window_that_the_attention_is_not_told_of_is_refused(llama, monkeypatch):
    base = load(llama)
    monkeypatch.setattr(base.model.config, "sliding_window", 20, raising=False)
    with pytest.raises(ModelError, match="sliding_window 20 and does not tell its attention"):
        ModelRunner(base, limits(1))
    ModelRunner(load(llama, max_model_len=20), limits(1))


def test_scarce_memory_still_serves_one_row_whose_length_is_no_multiple_of_a_block(llama, monkeypatch):
    base = load(llama, max_model_len=100)
    token = 3 * 2 * 2 * 16 * 4  # layers, keys and values, heads, dimensions, bytes
    memory = type("Memory", (), {"available": 128 * token / 0.4 + 1})
    monkeypatch.setattr("worker.engine.base_model.psutil.virtual_memory", memory)
    shape = ModelRunner(base, limits(2)).cache_shape
    assert shape == CacheShape(4, 32)


def test_a_model_without_adapters_looks_at_no_weight_for_their_sake(llama, monkeypatch):
    monkeypatch.setattr("worker.engine.proof.fingerprints", lambda _: pytest.fail("looked at"))
    base = load(llama)
    runner = ModelRunner(base, limits(1), expected=expect(base, adapters=False))
    assert not runner.base_rows
    assert not any("row_norms" in vars(projection) for projection in runner._projections.values())
