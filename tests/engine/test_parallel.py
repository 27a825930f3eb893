"""A model that several ranks share says what it says on one device, and what PEFT says."""

import random
from typing import NamedTuple

import pytest
import torch

from tests import tiny
from tests.engine.harness import Harness
from tests.engine.ranks import ParallelHarness
from worker.engine import lora_layers
from worker.engine.adapters.adapter import Change, LoRAPair, LoRAWeights, Vocabulary
from worker.engine.cache_size import CacheShape
from worker.engine.kv_cache import Leftover
from worker.engine.lora_plan import Way
from worker.errors import EngineFailed, ModelError
from worker.jobs import AdapterKey, FinishReason, InferenceRequest, SamplingParams

NEW = 12
POISON = 271
HEAD = tuple(range(30, 70))
THREE = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96, "intermediate_size": 114}


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.choice([1, 2, 3, 5, 9, 17, 40]))] for _ in range(count)]


def request(name, prompt, adapter=None, **params):
    params = {"max_new_tokens": NEW, "ignore_eos": True, **params}
    return InferenceRequest(id=name, prompt=tuple(prompt), adapter=adapter, params=SamplingParams(**params))


def mixed(keys, rows, **params):
    made = [
        request(f"{index}/{row}", prompt, key, **params)
        for index, key in enumerate(keys)
        for row, prompt in enumerate(rows)
    ]
    random.Random(1).shuffle(made)
    return made


def tokens(completions):
    return {name: done.token_ids for name, done in completions.items() if done.failure is None}


def assert_as_peft(model, rows, done, adapters):
    for row, prompt in enumerate(rows):
        answers = [list(done[f"{index}/{row}"].token_ids) for index in range(adapters + 1)]
        for index, answer in enumerate(answers):
            assert answer == model.greedy(index - 1 if index else None, prompt, answer), (index, row)
        assert len({tuple(answer) for answer in answers}) > adapters // 2, "the adapters differ too little"


WAYS = [(True, "llama"), (False, "llama"), (True, "qwen2"), (False, "qwen2"), (True, "gemma2"),
        (True, "qwen3"), (True, "phi3"), (False, "phi3"), (True, "gpt-neox")]  # fmt: skip


@pytest.mark.parametrize(("fully", "architecture"), WAYS)
def test_mixed_batch_equals_peft_token_for_token(architecture, fully, kind):
    model, rows = kind(architecture), prompts(3)
    sizes = {"max_num_seqs": 6, "max_loras": 3, "max_num_batched_tokens": 24}
    with ParallelHarness(model.base, fully_sharded=fully, **sizes) as harness:
        done = harness.run(mixed([None, *map(harness.adapter, model.adapters)], rows))
    assert max(stats.adapters for stats in harness.stats) == 3
    assert_as_peft(model, rows, done, len(model.adapters))


@pytest.mark.parametrize("way", Way)
@pytest.mark.parametrize(("degree", "fully"), [(3, True), (3, False), (6, True)])
def test_ranks_that_do_not_divide_and_odd_degrees_are_right(degree, fully, way, tmp_path, monkeypatch):
    monkeypatch.setattr(lora_layers, "cheapest", lambda *_: way)
    changes = THREE if degree == 3 else {**THREE, "num_key_value_heads": 6}
    base = tiny.make_base(tmp_path / "base", "qwen2", num_hidden_layers=2, **changes)
    every = [*tiny.ATTENTION, *tiny.MLP]
    folders = [
        tiny.make_adapter(tmp_path / f"r{rank}", base, seed=rank, r=rank, scale=2.0, target_modules=names)
        for rank, names in [(1, every), (5, every[:3]), (4, every[3:]), (17, every)]
    ]
    rows = prompts(3)
    plain = Harness(base, max_loras=4)
    expected = tokens(plain.run(mixed([None, *map(plain.adapter, folders)], rows)))
    assert len(set(expected.values())) > len(rows) * len(folders)
    with ParallelHarness(base, degree=degree, fully_sharded=fully, max_loras=4) as harness:
        done = harness.run(mixed([None, *map(harness.adapter, folders)], rows))
    assert tokens(done) == expected
    for folder, prompt in zip(folders[::3], rows, strict=False):
        index = folders.index(folder) + 1
        (peft,) = tiny.peft_generate(base, folder, [prompt], NEW, eos_token_id=None)
        assert list(done[f"{index}/{rows.index(prompt)}"].token_ids) == peft


@pytest.fixture(scope="module")
def said(llama, adapters):
    """What one device says: the harness that was asked, and its answers by row."""
    plain = Harness(llama, max_num_seqs=6, prefix_reuse=False)
    keys = [None, *map(plain.adapter, adapters[:3])]
    return lambda rows: tokens(plain.run(rows(keys)))


@pytest.mark.parametrize(
    "shape",
    [CacheShape(6, 160), CacheShape(60, 16), CacheShape(20, 8)],
    ids=["slots", "paged", "preempting"],
)
@pytest.mark.parametrize("look_ahead", [False, True], ids=["waiting", "ahead"])
def test_text_is_the_same_whatever_the_cache_and_the_order(shape, look_ahead, llama, adapters, said):
    def rows(keys):
        tails = [HEAD + (number,) * number for number in range(1, 4)]
        heads = mixed(keys, tails, do_sample=True, temperature=1.5)
        return heads + [request(f"own/{n}", own, keys[n % 4]) for n, own in enumerate(prompts(6, seed=4))]

    options = {
        "max_num_seqs": 6,
        "max_num_batched_tokens": 24,
        "cache_shape": shape,
        "look_ahead": look_ahead,
    }
    with ParallelHarness(llama, **options) as harness:
        harness.engine._scheduler.lengths.ratio = 0.0  # nobody is expected to grow
        done = harness.run(rows([None, *map(harness.adapter, adapters[:3])]))
        assert sum(stats.reused_tokens for stats in harness.stats) > 0
        handed_out = [call for call, _ in harness.meeting.calls if call == "hand out"]
    assert tokens(done) == said(rows)
    assert bool(handed_out) == look_ahead
    assert (harness.stats[-1].preempted > 0) == (shape.num_blocks * shape.block_size < 200)


def test_scores_and_sampling_see_whole_logits(llama, adapters, make_harness):
    rows = [
        InferenceRequest(
            id=f"row{number}",
            prompt=(*prompt, 9, 10, 11),
            adapter=None,
            targets=(10, 11, 12),
            params=SamplingParams(max_new_tokens=0),
        )
        for number, prompt in enumerate(prompts(4))
    ]
    one = make_harness(llama).run(rows)
    with ParallelHarness(llama) as harness:
        assert harness.runner.num_logits == make_harness(llama).runner.num_logits
        done = harness.run(rows)
    for name, completion in one.items():
        assert done[name].score.log_probs == pytest.approx(completion.score.log_probs, abs=1e-4)


def test_another_type_of_adapters_is_summed_in_that(llama, adapters):
    rows = prompts(3)
    options = {"lora_dtype": torch.bfloat16, "max_loras": 4}
    logits = []
    for harness in (Harness(llama, **options), ParallelHarness(llama, **options)):
        key = harness.adapter(adapters[2])
        harness.run(mixed([key], rows, max_new_tokens=2))
        logits.append(harness.run([request("x", rows[0], key, details=True)])["x"].log_probs)
        harness.runner.close()
    assert logits[1] == pytest.approx(logits[0], abs=0.1)


@pytest.mark.parametrize("fully", [True, False])
def test_each_rank_keeps_its_part_of_cache_weights_and_adapters(fully, llama, adapters):
    one = Harness(llama, max_loras=2, cache_shape=CacheShape(4, 160))
    one.run([request("x", [1, 2, 3], one.adapter(adapters[2]))])
    with ParallelHarness(llama, fully_sharded=fully, max_loras=2, cache_shape=CacheShape(4, 160)) as harness:
        harness.run([request("x", [1, 2, 3], harness.adapter(adapters[2]))])
        whole, *parts = (own._local.lora for own in (one.runner, *harness.runners[1:], harness.runners[1]))
    assert [own.cache_bytes * 2 for own in harness.runners] == [one.runner.cache_bytes] * 2
    sizes = [sum(table._memory[0].nbytes for _, table in lora._tables.values()) for lora in (whole, *parts)]
    share = max(sizes[1:]) / sizes[0]
    assert 0.5 <= share < (0.53 if fully else 0.85)
    assert fully or share > 0.6


def test_what_is_scrubbed_is_scrubbed_on_every_rank(llama):
    with ParallelHarness(llama, cache_shape=CacheShape(8, 160)) as harness:
        harness.run([request(str(number), prompt) for number, prompt in enumerate(prompts(8))])
        caches = [[*runner._attention._cache.values()] for runner in harness.runners]
        assert all(tensor.any() for layers in caches for layer in layers for tensor in layer)
        harness.runner.scrub(Leftover(block, 0, 160) for block in range(8))
        assert harness.runner.is_sound()  # which takes all ranks
        assert not any(tensor.any() for layers in caches for layer in layers for tensor in layer)


# Trouble


@pytest.fixture
def harness(llama):
    with ParallelHarness(llama, max_num_seqs=8) as harness:
        yield harness


def hook(runners, function):
    """Put a function of token ids and embeddings behind the embedding of these ranks."""
    for runner in runners:
        embedding = runner._model.get_input_embeddings()
        embedding.register_forward_hook(lambda _m, args, out: function(args[0][0], out[0]))


def raise_on_poison(ids, _embedded):
    if (ids == POISON).any():
        raise RuntimeError("poisoned")


def nan_on_poison(ids, embedded):
    embedded[ids == POISON] = torch.nan


@pytest.mark.parametrize("harm", [raise_on_poison, nan_on_poison])
def test_a_row_that_fails_on_all_ranks_alike_fails_alone(harm, harness, adapters):
    keys = [None, harness.adapter(adapters[0])]
    rows = mixed(keys, prompts(4))
    expected = tokens(harness.run(rows))
    hook(harness.runners, harm)
    done = harness.run([*rows[:3], request("bad", [5, POISON, 6], keys[1]), *rows[3:]])
    assert done["bad"].finish_reason is FinishReason.ERROR
    assert done["bad"].failure.code == "internal"
    assert tokens(done) == expected
    assert tokens(harness.run(rows)) == expected


@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_that_fails_on_one_rank_alone_ends_the_engine(rank, harness):
    expected = tokens(harness.run([request("good", [1, 2, 3])]))
    assert expected
    hook(harness.runners[rank : rank + 1], raise_on_poison)
    with pytest.raises(EngineFailed):
        harness.run([request("bad", [5, POISON, 6]), request("good", [1, 2, 3])])


@pytest.mark.parametrize("rank", [0, 1])
def test_an_adapter_that_one_rank_cannot_put_fails_its_own_rows(rank, harness, adapters, monkeypatch):
    keys = [harness.adapter(adapters[0]), harness.adapter(adapters[1])]
    rows = mixed([None, *keys], prompts(2))
    expected = tokens(harness.run(rows))
    lora = harness.runners[rank]._local.lora
    before = lora.put
    with monkeypatch.context() as patch:

        def put(slot, weights):
            if weights.key.name == "other":
                raise MemoryError("no room")
            before(slot, weights)

        patch.setattr(lora, "put", put)
        other = AdapterKey("other", "1")
        assert harness.store.reserve(other)
        harness.store._entries[other].weights = harness.store.weights(keys[0])._replace(key=other)
        done = harness.run([*rows, request("lost", [1, 2], other)])
    assert done["lost"].failure.code == "internal"
    assert "no room" in done["lost"].failure.message
    assert tokens(done) == expected
    again = harness.run([request("lost", [1, 2], other), request("same", [1, 2], keys[0])])
    assert again["lost"].token_ids == again["same"].token_ids


def test_an_adapter_with_more_than_pairs_is_not_shared(harness, llama):
    class More(NamedTuple):
        key: AdapterKey
        pairs: dict[str, LoRAPair]
        shifts: dict[str, torch.Tensor]
        rope_factor: float = 2.0

    key, share = AdapterKey("a", "1"), harness.shares[0]
    with pytest.raises(AssertionError, match="shifts"):
        share.weights(More(key, {}, {"x": torch.ones(1)}), share.rank)
    assert share.weights(More(key, {}, {}), share.rank) == LoRAWeights(key, {}, rope_factor=2.0)
    for own in ({"changes": {"model.norm": Change()}}, {"vocabulary": Vocabulary(280, 280)}):
        with pytest.raises(AssertionError, match=next(iter(own))):
            share.weights(LoRAWeights(key, {}, **own), share.rank)


@pytest.mark.parametrize(
    ("architecture", "degree", "changes", "said"),
    [
        ("llama", 4, {}, "4 does not divide num_key_value_heads 2 of LlamaForCausalLM"),
        ("llama", 3, {}, "does not divide out_features 64 of model.layers.0.self_attn.q_proj"),
        ("qwen2", 2, {"intermediate_size": 113}, "out_features 113 of model.layers.0.mlp.gate_proj"),
        ("gpt2", 2, {}, "GPT2LMHeadModel has no plan for tensor parallelism in transformers"),
        ("opt", 2, {}, "OPTForCausalLM has no plan"),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused(architecture, degree, changes, said, tmp_path):
    base = tiny.make_base(tmp_path / "base", architecture, **changes)
    with pytest.raises(ModelError, match=said):
        ParallelHarness(base, degree=degree)


def test_a_plan_that_is_not_followed_is_refused(llama, monkeypatch):
    from transformers import LlamaForCausalLM

    plan = {"model.layers.*.mlp.up_proj": "colwise", "model.layers.*.mlp.down_proj": "packed_rowwise"}
    monkeypatch.setattr(LlamaForCausalLM, "tp_plan", property(lambda _: plan))
    with pytest.raises(ModelError, match=r"has packed_rowwise for model.layers.0.mlp.down_proj"):
        ParallelHarness(llama)


def test_a_share_that_computes_something_else_is_found_at_the_start(llama, monkeypatch):
    from worker.engine import cuts
    from worker.engine.parallel import share

    def wrong(module, cut, rank):
        cuts.cut_module(module, cut, rank)
        if rank.number:
            module.weight.data[0] += 1

    monkeypatch.setattr(share, "cut_module", wrong)
    with pytest.raises(ModelError, match="packed logits differ"):
        ParallelHarness(llama)
