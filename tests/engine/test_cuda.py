"""The engine on a GPU: the same promises as on the CPU."""

import random
import warnings

import pytest
import torch
from peft import PeftModel

from tests import parity, tiny
from tests.engine.harness import Harness
from tests.engine.test_score import expected, rows_of, to_score
from worker.engine.cache_size import CacheShape
from worker.jobs import InferenceRequest, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
NEW = 12


def prompts(count=4, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.choice([1, 2, 5, 17, 40]))] for _ in range(count)]


def requests(keys, rows, **params):
    params = SamplingParams(**{"max_new_tokens": NEW, "ignore_eos": True, **params})
    made = [
        InferenceRequest(id=f"{index}/{row}", prompt=tuple(prompt), adapter=key, params=params)
        for index, key in enumerate(keys)
        for row, prompt in enumerate(rows)
    ]
    random.Random(1).shuffle(made)
    return made


def adapters_of(folder, base, architecture):
    every = tiny.ARCHITECTURES[architecture][2]
    fan = {"fan_in_fan_out": True} if architecture == "gpt2" else {}
    shapes = [{"r": 4, "target_modules": every[:2]}, {"r": 9, "target_modules": every, "use_rslora": True}]
    return [
        tiny.make_adapter(folder / f"adapter{number}", base, seed=number + 1, **shape, **fan)
        for number, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_float32_tokens_are_those_of_peft_on_the_cpu(architecture, tmp_path):
    base = tiny.make_base(tmp_path / "base", architecture)
    folders = [None, *adapters_of(tmp_path, base, architecture)]
    rows = prompts()
    harness = Harness(base, device="cuda", max_loras=2, max_num_seqs=6, max_num_batched_tokens=48)
    keys = [folder and harness.adapter(folder) for folder in folders]
    done = harness.run(requests(keys, rows))
    for index, folder in enumerate(folders):
        expected = tiny.peft_generate(base, folder, rows, NEW, eos_token_id=None)
        assert [list(done[f"{index}/{row}"].token_ids) for row in range(len(rows))] == expected


@pytest.mark.parametrize("shape", [CacheShape(6, 160), CacheShape(60, 16), CacheShape(25, 8)])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mistral"])
def test_tokens_are_the_same_whatever_the_cache(architecture, shape, tmp_path):
    base = tiny.make_base(tmp_path / "base", architecture)
    rows = prompts(6, seed=3)
    harness = Harness(base, device="cuda", max_num_seqs=6, max_num_batched_tokens=11, cache_shape=shape)
    done = harness.run(requests([None], rows))
    expected = tiny.peft_generate(base, None, rows, NEW, eos_token_id=None)
    assert [list(done[f"0/{row}"].token_ids) for row in range(len(rows))] == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_half_precision_log_probs_are_near_those_of_float32(architecture, dtype, tmp_path):
    base = tiny.make_base(tmp_path / "base", architecture)
    folders = [None, *adapters_of(tmp_path, base, architecture)]
    rows = prompts()
    harness = Harness(base, device="cuda", dtype=dtype, max_loras=2)
    keys = [folder and harness.adapter(folder) for folder in folders]
    done = harness.run(requests(keys, rows, details=True))
    for index, folder in enumerate(folders):
        model = tiny.load_base(base)
        model = model if folder is None else PeftModel.from_pretrained(model, folder).eval()
        differences = []
        for row, prompt in enumerate(rows):
            own = done[f"{index}/{row}"]
            assert own.failure is None
            assert len(own.token_ids) == NEW
            with torch.inference_mode():
                logits = model(torch.tensor([[*prompt, *own.token_ids]])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(dim=-1)[range(NEW), list(own.token_ids)]
            differences.append((expected - torch.tensor(own.log_probs)).abs())
        assert torch.cat(differences).median() < 0.2


def test_sampled_rows_say_the_same_alone_and_mixed(llama, adapters):
    harness = Harness(llama, device="cuda")
    keys = [None, *map(harness.adapter, adapters[:2])]
    rows = requests(keys, prompts(), do_sample=True, temperature=1.5, top_k=40, top_p=0.9)
    mixed = harness.run(rows)
    for own in rows:
        assert harness.run([own])[own.id].token_ids == mixed[own.id].token_ids


def test_adapters_take_turns_in_few_slots(llama, adapters):
    harness = Harness(llama, device="cuda", max_loras=2)
    keys = [harness.adapter(folder) for folder in adapters]
    rows = prompts(2)
    done = harness.run(requests(keys, rows))
    for index, folder in enumerate(adapters):
        expected = tiny.peft_generate(llama, folder, rows, NEW, eos_token_id=None)
        assert [list(done[f"{index}/{row}"].token_ids) for row in range(len(rows))] == expected


def test_cache_fits_the_device(llama):
    harness = Harness(llama, device="cuda", max_num_seqs=4)
    assert harness.runner.cache_bytes <= torch.cuda.get_device_properties(0).total_memory


@pytest.mark.parametrize("shape", [CacheShape(60, 16), CacheShape(25, 8)])
def test_scores_are_log_softmax_of_the_plain_model_on_the_cpu(shape, llama, adapters):
    folders = [None, *adapters[:2]]
    harness = Harness(llama, device="cuda", max_num_seqs=6, max_num_batched_tokens=48, cache_shape=shape)
    keys = [folder and harness.adapter(folder) for folder in folders]
    rows = {
        f"{index}/{row}/{count}": (index, tokens, count)
        for index in range(3)
        for row, (tokens, count) in enumerate(rows_of([2, 17, 80]))
    }
    scored = [to_score(name, tokens, count, keys[index]) for name, (index, tokens, count) in rows.items()]
    done = harness.run([*scored, *requests(keys, prompts())])
    for name, (index, tokens, count) in rows.items():
        log_probs, is_greedy = expected(llama, folders[index], tokens, count)
        assert done[name].score.log_probs == pytest.approx(log_probs, abs=1e-3)
        assert done[name].score.is_greedy is is_greedy


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "qwen2-tied", "gpt2", "gemma3-tied"])
def test_every_kind_of_adapter_says_what_peft_says(architecture, tmp_path):
    with warnings.catch_warnings(action="ignore"):
        found = dict(parity.cells(parity.SHAPES[architecture], parity.FEATURES, tmp_path, device="cuda"))
    assert [cell for cell in found.items() if not parity.is_right(cell[1])] == []
    assert list(found.values()).count("equal") > len(parity.FEATURES) // 2


def test_decoding_is_captured_again_when_nobody_changes_modules(llama, tmp_path):
    plain, shape, names = tiny.load_base(llama), parity.SHAPES["llama"], ["LoRA", "use_dora", "added tokens"]
    harness = Harness(llama, device="cuda", max_loras=2)
    with warnings.catch_warnings(action="ignore"):
        tuned = [parity.tune(plain, shape, parity.FEATURES[name], tmp_path / name, 1) for name in names]
    keys = [harness.adapter(own.folder) for own in tuned]
    first = harness.run(requests([None, *keys], prompts()))
    again = harness.run(requests([None, keys[0]], prompts()))
    assert all(own.token_ids == first[name].token_ids for name, own in again.items())
