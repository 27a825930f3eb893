"""The way of the GPU, its kernels run by Triton's interpreter: the same tokens as PEFT.

`test_kernels.py` runs this file by its name, with TRITON_INTERPRET=1; pytest does not collect it by itself.
"""

import dataclasses
import random
import threading
import warnings

import pytest
from triton.runtime import interpreter

from tests import parity, tiny
from tests.engine.harness import Harness
from tests.engine.ranks import ParallelHarness
from worker.engine import lora_kernels, merging
from worker.engine.cache_size import CacheShape
from worker.engine.graphs import DecodeGraphs
from worker.engine.kernels.tilings import Fit, Tuner, Work, default_tiling
from worker.engine.lora_ops import add_stack
from worker.engine.merging import LoRAMode
from worker.jobs import InferenceRequest, SamplingParams

NEW = 4


class Recorded:
    """A capture that plays a forward pass again by running it: the addresses are what is tested."""

    def __init__(self):
        self.captured = 0

    def __call__(self, forward):
        self.captured += 1
        logits = forward()

        def replay():
            logits.copy_(forward())

        return replay, logits


class OtherWays(Tuner):
    """Long runs by dense products, and kernels cut as they never are by default."""

    def tune(self, situation):
        tilings = {}
        for in_features, sizes in situation.projections:
            for tokens in (situation.decode_tokens, situation.chunk_tokens):
                work = Work(in_features, sizes, -(-situation.max_rank // 8) * 8, tokens, 4)
                tilings[work] = default_tiling(work)._replace(splits=2, ranks=16, features=16, columns=16)
        return Fit(tilings, dense_from=5)


def prompts(count, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.choice([1, 2, 5, 11]))] for _ in range(count)]


def requests(keys, rows, new=NEW):
    made = [
        InferenceRequest(
            id=f"{index}/{row}",
            prompt=tuple(prompt),
            adapter=key,
            params=SamplingParams(max_new_tokens=new, ignore_eos=True),
        )
        for index, key in enumerate(keys)
        for row, prompt in enumerate(rows)
    ]
    random.Random(1).shuffle(made)
    return made


def test_merged_steps_equal_peft_and_their_graphs_outlive_a_merge(tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "_STRETCH", 0.0)  # whatever runs alone is merged
    base = tiny.make_base(tmp_path / "base", **ONE_LAYER)
    folders = [
        tiny.make_adapter(tmp_path / str(n), base, seed=n, scale=2.0, r=4, target_modules=modules)
        for n, modules in enumerate((tiny.ATTENTION, tiny.MLP))
    ]
    harness = Harness(
        base, kernels=True, max_num_seqs=2, cache_shape=CacheShape(60, 8), lora_mode=LoRAMode.MERGED
    )
    harness.runner._executor._graphs = DecodeGraphs(Recorded(), 2)
    rows = prompts(2)
    for folder in (*folders, folders[0]):
        harness.stats.clear()
        done = harness.run(requests([harness.adapter(folder)], rows))
        assert all(stats.merged for stats in harness.stats[1:])
        expected = tiny.peft_generate(base, folder, rows, NEW, eos_token_id=None)
        assert [list(done[f"0/{row}"].token_ids) for row in range(len(rows))] == expected


TWO_LAYERS = {"num_hidden_layers": 2}
ONE_LAYER = {"num_hidden_layers": 1, "num_key_value_heads": 1, "hidden_size": 32, "intermediate_size": 48}


@pytest.fixture(autouse=True)
def _no_overflow_checks(monkeypatch):
    """They take a third of the interpreter's time; they are on in `test_kernels_gpu.py`."""
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))


@pytest.mark.parametrize("fully", [True, False])
@pytest.mark.parametrize("tuner", [None, OtherWays()], ids=["default", "other-ways"])
def test_ranks_that_share_a_model_say_what_peft_says(fully, tuner, tmp_path, monkeypatch):
    one_at_a_time, launch = threading.Lock(), interpreter.GridExecutor.__call__

    def locked(*given, **options):
        with one_at_a_time:  # the interpreter changes Triton's language while it runs
            return launch(*given, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", locked)
    base = tiny.make_base(tmp_path / "base", "qwen2", **{**ONE_LAYER, "num_key_value_heads": 2})
    every = tiny.ARCHITECTURES["qwen2"][2]
    folders = [
        None,
        tiny.make_adapter(tmp_path / "a", base, seed=1, scale=2.0, r=3, target_modules=every[:2]),
        tiny.make_adapter(
            tmp_path / "b", base, seed=2, scale=1.0, r=17, rank_pattern={"k_proj": 5}, target_modules=every
        ),
    ]
    rows = prompts(2)
    sizes = {"max_loras": 2, "max_lora_rank": 20, "max_num_seqs": 5, "max_num_batched_tokens": 20}
    shape = CacheShape(60, 8)
    with ParallelHarness(
        base, fully_sharded=fully, kernels=True, tuner=tuner, cache_shape=shape, **sizes
    ) as harness:
        done = harness.run(requests([folder and harness.adapter(folder) for folder in folders], rows))
        tables = [runner._local.lora._tables for runner in harness.runners]
    assert tables[0].keys() == tables[1].keys()
    assert any(table.parts == 2 for table in tables[0].values()) == fully
    answers = set()
    for index, folder in enumerate(folders):
        expected = tiny.peft_generate(base, folder, rows, NEW, eos_token_id=None)
        assert [list(done[f"{index}/{row}"].token_ids) for row in range(len(rows))] == expected
        answers.update(map(tuple, expected))
    assert len(answers) == len(folders) * len(rows), "the adapters do not differ enough to tell"


@pytest.mark.parametrize(
    ("architecture", "changes", "graphs", "tuner"),
    [
        ("llama", TWO_LAYERS, True, None),
        ("gemma2", TWO_LAYERS, False, None),
        ("gpt2", {"n_layer": 1, "n_head": 2, "n_embd": 32}, True, None),
        ("llama", ONE_LAYER, True, OtherWays()),
    ],
    ids=["llama", "gemma2", "gpt2", "llama-other-ways"],
)
def test_mixed_batch_equals_peft_token_for_token(architecture, changes, graphs, tuner, tmp_path, monkeypatch):
    dense = []
    monkeypatch.setattr(lora_kernels, "add_stack", lambda *given: dense.append(add_stack(*given)))
    base = tiny.make_base(tmp_path / "base", architecture, **changes)
    every = tiny.ARCHITECTURES[architecture][2]
    fan = {"fan_in_fan_out": True} if architecture == "gpt2" else {}
    folders = [
        None,
        tiny.make_adapter(tmp_path / "a", base, seed=1, scale=2.0, r=4, target_modules=every[:2], **fan),
        tiny.make_adapter(tmp_path / "b", base, seed=2, scale=1.0, r=9, target_modules=every, **fan),
    ]
    rows = prompts(2)
    harness = Harness(
        base,
        kernels=True,
        tuner=tuner,
        max_loras=2,
        max_lora_rank=16,
        max_num_seqs=5,
        max_num_batched_tokens=20,
        cache_shape=CacheShape(60, 8),
    )
    capture = Recorded()
    if graphs:
        harness.runner._executor._graphs = DecodeGraphs(capture, 5)
    keys = [folder and harness.adapter(folder) for folder in folders]
    done = harness.run(requests(keys, rows))
    answers = set()
    for index, folder in enumerate(folders):
        expected = tiny.peft_generate(base, folder, rows, NEW, eos_token_id=None)
        assert [list(done[f"{index}/{row}"].token_ids) for row in range(len(rows))] == expected
        answers.update(map(tuple, expected))
    assert len(answers) == len(folders) * len(rows), "the adapters do not differ enough to tell"
    assert bool(capture.captured) == graphs
    assert bool(dense) == (tuner is not None)
    if graphs:
        before = capture.captured
        again = harness.run(requests(keys[:2], rows, new=2))
        assert all(own.token_ids == done[name].token_ids[:2] for name, own in again.items())
        assert capture.captured <= before + 2


def test_adapters_that_change_modules_run_uncaptured_beside_others(tmp_path):
    warnings.simplefilter("ignore")
    features = ("LoRA", "saved embedding, lm_head, norms", "embedding and lm_head, use_dora", "added tokens")
    shape = parity.SHAPES["llama"]._replace(changes=ONE_LAYER)
    base = tiny.make_base(tmp_path / "base", "llama", **shape.changes)
    plain = tiny.load_base(base)
    tuned = [
        parity.tune(plain, shape, parity.FEATURES[name], tmp_path / f"adapter{number}", number + 1)
        for number, name in enumerate(features)
    ]
    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 40, "cache_shape": CacheShape(60, 8)}
    harness = Harness(base, kernels=True, max_loras=4, **sizes)
    capture = Recorded()
    harness.runner._executor._graphs = DecodeGraphs(capture, 8)
    keys = [None, *(harness.adapter(own.folder) for own in tuned)]
    rows = prompts(2)
    done = harness.run(requests(keys, rows))
    answers = set()
    for index, model in enumerate([plain, *(own.model for own in tuned)]):
        for row, prompt in enumerate(rows):
            answer = list(done[f"{index}/{row}"].token_ids)
            assert answer == parity.says(model, prompt, answer)
            answers.add(tuple(answer))
    assert len(answers) == len(keys) * len(rows), "the adapters do not differ enough to tell"
    before = capture.captured
    harness.run(requests(keys[2:], rows))
    assert capture.captured == before
    again = harness.run(requests(keys[:2], rows))
    assert all(own.token_ids == done[name].token_ids for name, own in again.items())
    assert capture.captured > before
