"""Tiny random base models, tokenizers and adapters of every shape that the tests need."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

EOS = "</s>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_VOCAB = 272
_COMMON = {
    "vocab_size": _VOCAB,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "eos_token_id": 256,
    "bos_token_id": None,
    "pad_token_id": 256,
    "initializer_range": 0.4,
}
_GPT = {"vocab_size": _VOCAB, "eos_token_id": 256, "bos_token_id": 256, "initializer_range": 0.3}

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]

ARCHITECTURES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": ("LlamaConfig", _COMMON, [*ATTENTION, *MLP]),
    "qwen2": ("Qwen2Config", _COMMON, [*ATTENTION, *MLP]),
    "qwen2-window": (
        "Qwen2Config",
        {**_COMMON, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        [*ATTENTION, *MLP],
    ),
    "qwen3": ("Qwen3Config", {**_COMMON, "head_dim": 24}, [*ATTENTION, *MLP]),
    "mistral": ("MistralConfig", {**_COMMON, "sliding_window": 5}, [*ATTENTION, *MLP]),
    "gemma": ("GemmaConfig", {**_COMMON, "head_dim": 16, "tie_word_embeddings": False}, [*ATTENTION, *MLP]),
    "gemma2": (
        "Gemma2Config",
        {
            **_COMMON,
            "head_dim": 16,
            "sliding_window": 5,
            "query_pre_attn_scalar": 16,
            "initializer_range": 0.08,
            "tie_word_embeddings": False,
        },
        [*ATTENTION, *MLP],
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {**_COMMON, "head_dim": 16, "sliding_window": 5, "tie_word_embeddings": False},
        [*ATTENTION, *MLP],
    ),
    "phi3": ("Phi3Config", _COMMON, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "gpt2": (
        "GPT2Config",
        {**_GPT, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 160},
        ["c_attn", "c_proj", "c_fc"],
    ),
    "gpt-neox": (
        "GPTNeoXConfig",
        {
            **_GPT,
            "hidden_size": 64,
            "intermediate_size": 112,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 160,
        },
        ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    ),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": _VOCAB,
            "hidden_size": 64,
            "ffn_dim": 112,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 160,
            "word_embed_proj_dim": 64,
            "eos_token_id": 256,
            "bos_token_id": 256,
            "pad_token_id": 256,
            "init_std": 0.3,
        },
        ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    ),
}

WITH_EXPERTS = {
    "mixtral": ("MixtralConfig", {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2}, ATTENTION)
}
"""Whose experts see other tokens than the rest, so that not all that adapters do is served."""
ALL = {**ARCHITECTURES, **WITH_EXPERTS}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, then the EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOS, chat_template=CHAT_TEMPLATE)


def write_tokenizer(folder: Path, names: list[str], *, eos: str = EOS, template: str = CHAT_TEMPLATE) -> None:
    """That of an adapter which brings these tokens, after all rows that a base model has."""
    own = tokenizer()
    own.add_tokens([f"<unused{number}>" for number in range(len(own), _VOCAB)])
    own.add_tokens(names)
    own.eos_token, own.chat_template = eos, template
    assert own.convert_tokens_to_ids(names) == list(range(_VOCAB, _VOCAB + len(names)))
    own.save_pretrained(folder)


def make_base(folder: Path, architecture: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """A random base model with tokenizer, saved in `folder`."""
    name, settings, _ = ALL[architecture]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**settings, **changes}))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def load_base(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_adapter(folder: Path, base: Path, *, seed: int = 0, scale: float = 0.4, **config: Any) -> Path:
    """A random adapter strong enough to change what the base says, saved in `folder` by PEFT."""
    torch.manual_seed(seed)
    model = get_peft_model(load_base(base), LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.normal_(0.0, scale / tensor.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return folder


def peft_generate(
    base: Path, adapter: Path | None, prompts: Iterable[list[int]], max_new_tokens: int, **options: Any
) -> list[list[int]]:
    """What PEFT's own `generate` makes of each prompt by itself, greedily."""
    model: Any = load_base(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    results = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=256,
                **options,
            )
        results.append(output[0, len(prompt) :].tolist())
    return results
