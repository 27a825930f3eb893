"""Adapters that do more than add to linear modules, and neighbours of theirs that notice nothing."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import parity, tiny
from tests.engine.harness import Harness
from worker.engine.adapters.loader import CONFIG_FILE, WEIGHTS_FILE
from worker.engine.cache_size import CacheShape
from worker.engine.fingerprints import fingerprints
from worker.engine.projections import Projection
from worker.errors import AdapterInvalid, InvalidParameters
from worker.jobs import FinishReason, InferenceRequest, SamplingParams

ROWS = 272
FIRST_NEW = ROWS
NAMES = [f"<new{number}>" for number in range(parity.NEW_TOKENS)]
PROMPTS = [(1, 2, 3), (40, 41), (7,) * 9, tuple(range(100, 130))]


@pytest.fixture(scope="session")
def made(llama, tmp_path_factory):
    """By feature, adapters of `llama` and PEFT's models of them."""
    root, plain, known = tmp_path_factory.mktemp("kinds"), tiny.load_base(llama), {}

    def make(feature):
        if feature not in known:
            with warnings.catch_warnings(action="ignore"):
                folder = root / f"kind{len(known)}"
                shape = parity.SHAPES["llama"]
                known[feature] = parity.tune(plain, shape, parity.FEATURES[feature], folder, len(known))
        return known[feature]

    return make


@pytest.fixture
def folder_of(made, tmp_path):
    """A copy that a test may damage."""
    return lambda feature: shutil.copytree(made(feature).folder, tmp_path / "tone")


def request(name, prompt, adapter=None, **params):
    params = {"max_new_tokens": 10, "ignore_eos": True, **params}
    return InferenceRequest(id=name, prompt=tuple(prompt), adapter=adapter, params=SamplingParams(**params))


def rows(key=None, name="", **params):
    return [request(f"{name}{row}", prompt, key, **params) for row, prompt in enumerate(PROMPTS)]


def told(completion):
    return completion.token_ids, completion.log_probs, completion.top_tokens, completion.prompt_log_probs


# Neighbours

KINDS = ["use_dora", "lora_bias", "embedding and lm_head", "saved embedding, lm_head, norms", "saved linear"]
NEW_KINDS = ["added tokens", "added tokens, LoRA", "added tokens, indices"]


def test_base_rows_do_not_change_by_a_bit_beside_any_of_them(made, llama):
    harness = Harness(llama, max_num_seqs=16, max_num_batched_tokens=400)
    asked = {"details": True, "top_n_tokens": 20, "prompt_log_probs": True}
    # Always as many rows, so that the products have the same shapes; who they are of is what changes.
    kinds = {"x": "use_dora", "y": "added tokens", "z": "saved norms"}
    alone = harness.run([*rows(**asked), *(row for name in kinds for row in rows(None, name))])
    keys = {name: harness.adapter(made(kind).folder) for name, kind in kinds.items()}
    mixed = harness.run([*rows(**asked), *(row for name, key in keys.items() for row in rows(key, name))])
    for row in range(len(PROMPTS)):
        assert told(mixed[f"{row}"]) == told(alone[f"{row}"])
        assert all(mixed[f"{name}{row}"].token_ids != alone[f"{name}{row}"].token_ids for name in kinds)
    assert max(max(mixed[f"y{row}"].token_ids) for row in range(len(PROMPTS))) >= FIRST_NEW


@pytest.mark.parametrize("kind", NEW_KINDS)
def test_nobody_else_says_an_adapters_own_tokens(kind, made, llama):
    harness = Harness(llama, max_num_seqs=16)
    own, other = harness.adapter(made(kind).folder), harness.adapter(made("use_dora").folder)
    asked = {"do_sample": True, "temperature": 50.0, "details": True, "top_n_tokens": 20, "seed": 1}
    everybody = {"own": own, "other": other, "base": None}
    done = harness.run(row for name, key in everybody.items() for row in rows(key, name, **asked))
    for name, completion in done.items():
        likely = {token for top in completion.top_tokens for token, _ in top}
        found = likely | set(completion.token_ids)
        assert (max(found) >= FIRST_NEW) == name.startswith("own"), name
        assert max(found) < FIRST_NEW + parity.NEW_TOKENS


def test_rows_that_resizing_has_taken_away_are_never_said(made, llama):
    harness = Harness(llama, max_num_seqs=16)
    key, last = harness.adapter(made("fewer tokens").folder), ROWS - parity.NEW_TOKENS
    asked = {"do_sample": True, "temperature": 50.0, "details": True, "top_n_tokens": 20, "seed": 1}
    done = harness.run([*rows(key, "own", **asked), *rows(None, "base", **asked)])
    found = {"own": set(), "base": set()}
    for name, completion in done.items():
        found[name[:-1]].update(token for top in completion.top_tokens for token, _ in top)
    assert max(found["own"]) < last <= max(found["base"])
    with pytest.raises(InvalidParameters, match=f"token {last}, adapter {key.name} knows {last} tokens"):
        harness.engine.add(request("row", (1, last), key))


@pytest.mark.parametrize("kind", NEW_KINDS)
def test_probabilities_are_those_of_all_tokens_of_the_adapter(kind, made, llama):
    harness, tuned = Harness(llama, max_num_seqs=16), made(kind)
    key = harness.adapter(tuned.folder)
    asked = {"details": True, "prompt_log_probs": True}
    done = harness.run([*rows(key, "own", **asked), *rows(name="base", details=True)])
    for row, prompt in enumerate(PROMPTS):
        own = done[f"own{row}"]
        with torch.inference_mode():
            logits = tuned.model(torch.tensor([[*prompt, *own.token_ids]])).logits[0].log_softmax(-1)
        expected = logits[range(len(prompt) - 1, len(prompt) + 9), list(own.token_ids)]
        assert own.log_probs == pytest.approx(expected.tolist(), abs=1e-4)
        before = logits[range(len(prompt) - 1), list(prompt[1:])]
        assert own.prompt_log_probs[1:] == pytest.approx(before.tolist(), abs=1e-4)


def test_looking_ahead_and_preempting_change_nothing(made, llama):
    shapes = [CacheShape(16, 160), CacheShape(24, 8)]
    kinds = ("added tokens", "embedding and lm_head", "LoRA")
    asked = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "details": True, "max_new_tokens": 24}
    said = []
    for look_ahead, shape in ((False, shapes[0]), (True, shapes[0]), (True, shapes[1])):
        harness = Harness(llama, max_num_seqs=16, look_ahead=look_ahead, cache_shape=shape)
        harness.engine._scheduler.lengths.ratio = 0.0  # nobody is expected to grow
        keys = {kind: harness.adapter(made(kind).folder) for kind in kinds}
        done = harness.run(row for kind, key in keys.items() for row in rows(key, kind, **asked))
        said.append({name: own.token_ids for name, own in done.items()})
    assert said[0] == said[1] == said[2]
    assert harness.stats[-1].preempted > 0
    assert max(max(own) for own in said[0].values()) >= FIRST_NEW


@pytest.mark.parametrize("kind", [*KINDS, *NEW_KINDS])
def test_a_slot_is_the_next_adapters_alone(kind, made, llama):
    harness = Harness(llama, max_loras=1, max_num_seqs=4)
    plain, changing = harness.adapter(made("LoRA").folder), harness.adapter(made(kind).folder)

    def said(key):
        done = harness.run(rows(key))
        return [done[str(row)].token_ids for row in range(len(PROMPTS))]

    turns = [None, plain, changing]
    first = [said(key) for key in turns]
    assert [said(key) for key in (*reversed(turns), *turns)] == [*reversed(first), *first]
    assert len({tuple(tokens) for tokens in first}) == 3


def test_modules_are_their_own_again_once_the_slot_is_anothers(made, llama):
    harness = Harness(llama, max_loras=1)
    modules = dict(harness.base.model.named_modules())
    changed = [modules["model.norm"], modules["model.embed_tokens"]]
    harness.run([request("a", (1, 2), harness.adapter(made("saved embedding, lm_head, norms").folder))])
    assert all("forward" in module.__dict__ for module in changed)
    harness.run([request("b", (1, 2), harness.adapter(made("LoRA").folder))])
    assert not any("forward" in module.__dict__ for module in changed)


def test_a_shared_instruction_is_shared_with_nobody_else(made, llama):
    harness = Harness(llama, max_num_seqs=4, cache_shape=CacheShape(80, 8))
    keys = [None, harness.adapter(made("saved embedding").folder), harness.adapter(made("use_dora").folder)]
    head = tuple(range(30, 70))
    alone = [Harness(llama, prefix_reuse=False) for _ in keys]
    for number, key in enumerate(keys):
        if key is not None:
            alone[number].adapter(made(("saved embedding", "use_dora")[number - 1]).folder)
    for tail in ((1,), (2, 3)):
        done = harness.run([request(f"{n}/{tail}", head + tail, key) for n, key in enumerate(keys)])
        for number, key in enumerate(keys):
            expected = alone[number].run([request("row", head + tail, key)])["row"]
            assert done[f"{number}/{tail}"].token_ids == expected.token_ids
    assert sum(own.reused_tokens for own in harness.stats) >= 3 * 32


# An adapter's own tokens


def test_prompts_and_parameters_may_name_an_adapters_own_tokens_only_with_it(made, llama):
    harness = Harness(llama)
    key, other = harness.adapter(made("added tokens").folder), harness.adapter(made("LoRA").folder)
    done = harness.run([request("own", (1, FIRST_NEW + 5), key, logit_bias=((FIRST_NEW + 1, 100.0),))])
    assert set(done["own"].token_ids) == {FIRST_NEW + 1}
    for adapter, whose in ((None, "the base model"), (other, f"adapter {other.name}")):
        with pytest.raises(InvalidParameters, match=f"token {FIRST_NEW}, {whose} knows {ROWS} tokens"):
            harness.engine.add(request("row", (1, FIRST_NEW), adapter))
        with pytest.raises(InvalidParameters, match=f"allowed_token_ids has token {FIRST_NEW}; {whose}"):
            harness.engine.add(request("row", (1,), adapter, allowed_token_ids=(FIRST_NEW,)))
    with pytest.raises(InvalidParameters, match=f"{FIRST_NEW + 6}, adapter {key.name} knows {ROWS + 6}"):
        harness.engine.add(request("row", (1, FIRST_NEW + 6), key))
    least = harness.runner.vocab_size + harness.runner.limits.lora_extra_vocab_size
    with pytest.raises(InvalidParameters, match=f"all that adapter {key.name} may add knows {least} tokens"):
        harness.engine.check(request("row", (1, least), key))
    assert not harness.engine.has_work


def test_own_tokens_are_scored_as_any(made, llama):
    harness, tuned = Harness(llama), made("added tokens")
    key = harness.adapter(tuned.folder)
    tokens = (5, 6, FIRST_NEW, 7, FIRST_NEW + 2)
    params = SamplingParams(max_new_tokens=0)
    to_score = InferenceRequest(id="s", prompt=tokens[:-1], adapter=key, params=params, targets=tokens[2:])
    done = harness.run([to_score, *rows(None, "base")])
    with torch.inference_mode():
        logits = tuned.model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    expected = logits[[1, 2, 3], list(tokens[2:])]
    assert done["s"].score.log_probs == pytest.approx(expected.tolist(), abs=1e-4)


def test_text_is_that_of_the_adapters_own_tokenizer_and_its_eos_ends(made, llama, tmp_path):
    folder = shutil.copytree(made("added tokens").folder, tmp_path / "own")
    tiny.write_tokenizer(folder, NAMES, eos=NAMES[3])
    harness = Harness(llama)
    key = harness.adapter(folder)
    bias = {"logit_bias": ((FIRST_NEW, 100.0),)}
    ending = {"logit_bias": ((FIRST_NEW + 3, 100.0),), "ignore_eos": False}
    done = harness.run(
        [
            request("says", (1,), key, max_new_tokens=3, **bias),
            request("stops", (1,), key, stop_sequences=(f"{NAMES[0]}<new",), **bias),
            request("ends", (1,), key, **ending),
            request("waits", (1,), key, min_new_tokens=4, **ending),
        ]
    )
    assert done["says"].text == 3 * NAMES[0]
    assert (done["stops"].text, done["stops"].finish_reason) == ("", FinishReason.STOP_SEQUENCE)
    assert (done["ends"].text, done["ends"].finish_reason) == ("", FinishReason.EOS_TOKEN)
    assert done["waits"].token_ids.index(FIRST_NEW + 3) == 4


@pytest.mark.parametrize(
    ("dtype", "lora_dtype"), [("bfloat16", None), ("float16", torch.float16), ("float32", torch.bfloat16)]
)
def test_lower_precision_is_near_peft_in_float32(dtype, lora_dtype, made, llama):
    harness = Harness(llama, dtype=dtype, lora_dtype=lora_dtype, max_num_seqs=16)
    keys = {kind: harness.adapter(made(kind).folder) for kind in (*KINDS, "token indices", *NEW_KINDS)}
    done = harness.run(row for kind, key in keys.items() for row in rows(key, kind, details=True))
    for kind in keys:
        differences = []
        for row, prompt in enumerate(PROMPTS):
            own = done[f"{kind}{row}"]
            assert own.failure is None
            with torch.inference_mode():
                logits = made(kind).model(torch.tensor([[*prompt, *own.token_ids]])).logits[0].log_softmax(-1)
            expected = logits[range(len(prompt) - 1, len(prompt) + 9), list(own.token_ids)]
            differences.append((expected - torch.tensor(own.log_probs)).abs())
        assert torch.cat(differences).median() < 0.2, kind


def test_only_what_is_new_is_kept_in_memory(made, llama):
    harness = Harness(llama)
    added, plain = harness.adapter(made("added tokens").folder), harness.adapter(made("LoRA").folder)
    weights = harness.store.weights(added)
    assert (made("added tokens").folder / WEIGHTS_FILE).stat().st_size > 2 * 4 * 64 * ROWS
    for name in ("model.embed_tokens", "lm_head"):
        change = weights.changes[name]
        assert change.rows.indices.tolist() == list(range(ROWS, ROWS + parity.NEW_TOKENS))
    extra = 2 * parity.NEW_TOKENS * (64 * 4 + 8)
    assert weights.num_bytes == harness.store.weights(plain).num_bytes + extra


def test_what_dora_needs_of_the_base_model_is_worked_out_once(made, llama, monkeypatch):
    multiply, asked = Projection.multiply, []
    monkeypatch.setattr(Projection, "multiply", lambda own, x: (asked.append(own), multiply(own, x))[1])
    harness = Harness(llama, max_loras=1)
    kinds = ("embedding and lm_head, use_dora", "use_dora")
    keys = [harness.adapter(made(kind).folder) for kind in kinds]
    first = [harness.run(rows(keys[0]))]
    assert len(asked) == len(set(asked)) > 1
    first.append(harness.run(rows(keys[1])))
    asked.clear()
    again = [harness.run(rows(key)) for key in keys]
    assert harness.stats[-1].slot_misses == 4
    assert not asked
    assert [[told(own) for own in done.values()] for done in again] == [
        [told(own) for own in done.values()] for done in first
    ]
    changes = harness.runner.executor.changes
    assert changes._gains
    for key in keys:
        harness.store.release(key)
    harness.store._entries.clear()
    assert not changes._gains


def test_rows_have_the_same_fingerprint_only_if_they_have_the_same_bits():
    weight = torch.randn(5000, 24)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        own = weight.to(dtype)
        changed = own.clone()
        changed[17, 3], changed[4999, 23] = changed[17, 3] * 1.01, -changed[4999, 23]
        assert (fingerprints(own) != fingerprints(changed)).nonzero().squeeze(1).tolist() == [17, 4999]
        assert len(fingerprints(own).unique()) == 5000
        assert torch.equal(fingerprints(own.T.contiguous().T), fingerprints(own))


# What is refused


def refusal(folder, base, **options):
    harness = Harness(base, cache_shape=CacheShape(1, 160), **options)
    with pytest.raises(AdapterInvalid) as caught:
        harness.adapter(folder)
    assert str(caught.value).startswith(f"Adapter {folder.name} is invalid: ")
    return str(caught.value)


def change_config(folder, **changes):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, change):
    """Have `change` change the tensors of the file, by name without its beginning."""
    path, start = folder / WEIGHTS_FILE, "base_model.model."
    tensors = {name.removeprefix(start): tensor for name, tensor in load_file(path).items()}
    change(tensors)
    save_file({f"{start}{name}": tensor.contiguous() for name, tensor in tensors.items()}, path)


@pytest.mark.parametrize("kind", [*NEW_KINDS, "added tokens, saved"])
def test_more_tokens_than_the_limit_are_refused_by_both_numbers(kind, made, llama):
    message = refusal(made(kind).folder, llama, lora_extra_vocab_size=5)
    assert "brings 6 tokens beside the base model's 272, the limit (lora_extra_vocab_size) is 5" in message


MAGNITUDE = "model.layers.1.self_attn.q_proj.lora_magnitude_vector"
DELTA = "model.embed_tokens.token_adapter.trainable_tokens_delta"
LORA_BIAS = "model.layers.1.self_attn.q_proj.lora_B.bias"
EMBEDDING_A = "model.embed_tokens.lora_embedding_A"
NORM = "model.norm.weight"
DAMAGES = {
    "no magnitude": ("use_dora", MAGNITUDE, None, "use_dora is true"),
    "magnitude of another size": ("use_dora", MAGNITUDE, lambda t: t[1:], "has shape [63]"),
    "magnitude is NaN": ("use_dora", MAGNITUDE, lambda t: t * torch.nan, "not finite"),
    "no bias": ("lora_bias", LORA_BIAS, None, "lora_bias is true"),
    "no copy": ("saved norms", NORM, None, "modules_to_save"),
    "copy of another size": ("saved norms", NORM, lambda t: t[1:], "the base model needs [64]"),
    "copy is infinite": ("saved norms", NORM, lambda t: t / 0, "model.norm has weights that are not finite"),
    "fewer to one end": ("saved lm_head", "lm_head.weight", lambda t: t[1:], "271 in lm_head"),
    "fewer than the tokenizer's": ("saved lm_head", "lm_head.weight", lambda t: t[:256], "needs [272, 64]"),
    "no tokens": ("token indices", DELTA, None, "trainable_token_indices"),
    "new to one end": ("added tokens", "lm_head.weight", None, "as many tokens are needed in both"),
    "more to one end": ("added tokens", "lm_head.weight", lambda t: t[1:], "277 in lm_head"),
    "two sizes of one end": (
        "added tokens, LoRA",
        "lm_head.lora_B.weight",
        lambda t: t[1:],
        "of module lm_head for 27",
    ),
    "columns of an embedding": ("embedding", EMBEDDING_A, lambda t: t[:, 1:], "embed_tokens for 27"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_what_is_not_whole_is_refused(case, folder_of, llama):
    kind, name, damage, reason = DAMAGES[case]
    folder = folder_of(kind)

    def change(tensors):
        old = tensors.pop(name)
        if damage is not None:
            tensors[name] = damage(old)

    change_tensors(folder, change)
    assert reason in refusal(folder, llama)


CONFIGS = [
    ("LoRA", {"bias": "some"}, "Invalid enum value 'some'"),
    ("LoRA", {"use_dora": "yes"}, "Expected `bool"),
    ("LoRA", {"modules_to_save": [1]}, "modules_to_save"),
    ("LoRA", {"modules_to_save": ["rotary_emb", "mlp", "up_proj"]}, "one of them is enough"),
    ("LoRA", {"modules_to_save": ["(a"]}, "is not a regular expression"),
    ("LoRA", {"trainable_token_indices": [1, -1]}, "trainable_token_indices"),
    ("token indices", {"trainable_token_indices": []}, "has no tokens"),
    ("token indices", {"trainable_token_indices": [1, 1]}, "one of them twice"),
    (
        "token indices",
        {"trainable_token_indices": list(range(250, 310))},
        "has 309 for module",
    ),
    ("token indices", {"trainable_token_indices": {"q_proj": [1]}}, "which has no rows of tokens"),
    ("token indices", {"trainable_token_indices": {"nowhere": [1]}}, "matches no module of the base model"),
    ("token indices", {"modules_to_save": ["embed_tokens"]}, "only one of them can be served"),
    ("use_dora", {"use_dora": False}, "lora_magnitude_vector belongs to no module"),
    ("lora_bias", {"use_dora": True}, "lora_bias"),
    ("embedding", {"lora_bias": True}, "an embedding, cannot have"),
    ("saved norms", {"modules_to_save": None}, "belongs to no module"),
    (
        "saved norms",
        {"modules_to_save": ["norm", "proj"]},
        "named by target_modules and by modules_to",
    ),
]


@pytest.mark.parametrize(("kind", "changes", "reason"), CONFIGS)
def test_settings_that_cannot_be_had_are_refused(kind, changes, reason, folder_of, llama):
    folder = folder_of(kind)
    change_config(folder, **changes)
    assert reason in refusal(folder, llama)


def test_routers_and_experts_are_not_replaced(tmp_path):
    base = tiny.make_base(tmp_path / "base", "mixtral")
    with warnings.catch_warnings(action="ignore"):
        for name in ("gate", "experts", "mlp"):
            config = {"target_modules": ["q_proj"], "modules_to_save": [name]}
            message = refusal(tiny.make_adapter(tmp_path / name, base, **config), base)
            assert "not supported" in message or "belongs to no module" in message


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", b"{}"), ("tokenizer.json", b"\xff"), ("tokenizer_config.json", b"[1]")],
)
def test_a_tokenizer_that_cannot_be_read_is_refused(name, content, folder_of, llama):
    folder = folder_of("LoRA")
    tiny.write_tokenizer(folder, NAMES)
    (folder / name).write_bytes(content)
    assert "its tokenizer cannot be read" in refusal(folder, llama)


def test_a_tokenizer_that_is_a_link_is_refused(folder_of, llama, tmp_path):
    folder = folder_of("LoRA")
    tiny.write_tokenizer(folder, NAMES)
    shutil.move(folder / "tokenizer.json", tmp_path / "elsewhere.json")
    (folder / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    assert "tokenizer.json is a link" in refusal(folder, llama)


def test_code_beside_an_adapter_is_not_run(folder_of, llama, tmp_path):
    folder = folder_of("LoRA")
    tiny.write_tokenizer(folder, NAMES)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    path = folder / "tokenizer_config.json"
    told = json.loads(path.read_text()) | {
        "tokenizer_class": "Own",
        "auto_map": {"AutoTokenizer": ["own.Own", None]},
    }
    path.write_text(json.dumps(told))
    assert "its tokenizer cannot be read" in refusal(folder, llama)
    assert not (tmp_path / "ran").exists()
