"""One adapter merged into the base: the same tokens, and a base that is the same to the last bit after it."""

import random

import pytest
import torch
from torch import nn

from tests import tiny
from tests.engine.harness import Harness
from worker.engine import merging
from worker.engine.adapters.adapter import LoRAPair
from worker.engine.merging import LoRAMode, Merging
from worker.engine.products import make_product
from worker.engine.projections import Projection
from worker.jobs import AdapterKey, InferenceRequest, SamplingParams

ONE, TWO = AdapterKey("one", "1"), AdapterKey("two", "1")
NEW = 12


# When to merge


def test_unmerged_never_merges():
    decision = Merging(LoRAMode.UNMERGED)
    decision.see(ONE, 1e9)
    assert not decision.wants(ONE)


def test_merged_begins_at_once_and_goes_over_to_another_after_a_stretch_of_it():
    decision = Merging(LoRAMode.MERGED)
    assert decision.wants(ONE)
    decision.done(ONE, 2.0)
    assert not decision.wants(ONE)
    decision.see(TWO, 19.0)
    assert not decision.wants(TWO)
    decision.see(TWO, 1.0)
    assert decision.wants(TWO)


def test_auto_merges_what_has_run_alone_for_ten_times_the_price():
    decision = Merging(LoRAMode.AUTO)
    decision.see(ONE, 9.0)
    assert not decision.wants(ONE)
    decision.see(ONE, 1.0)
    assert decision.wants(ONE)
    assert not decision.wants(TWO)


@pytest.mark.parametrize("other", [None, TWO])
def test_a_step_of_others_begins_the_stretch_anew(other):
    decision = Merging(LoRAMode.AUTO)
    decision.see(ONE, 9.0)
    decision.see(other, 1.0)
    decision.see(ONE, 9.0)
    assert not decision.wants(ONE)


def test_after_a_failure_nothing_is_merged_any_more():
    decision = Merging(LoRAMode.MERGED)
    decision.failed(ONE, MemoryError())
    decision.see(ONE, 1e9)
    assert decision.merged is None
    assert not decision.wants(ONE)


# What it computes


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "packed"])
def test_a_product_with_a_delta_leaves_the_first_as_it_was(plain, monkeypatch):
    if plain:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    torch.manual_seed(0)
    weight, bias, x = torch.randn(40, 24), torch.randn(40), torch.randn(5, 24)
    product, _ = make_product(weight.clone(), bias)
    before = product(x)
    spare = None
    for scale in (1.0, 3.0):
        delta = torch.randn(40, 24) * scale
        spare = product.plus(delta, spare)
        torch.testing.assert_close(spare(x), x @ (weight + delta).T + bias, rtol=1e-5, atol=1e-5)
    assert torch.equal(product(x), before)


def test_modules_without_the_adapter_keep_their_part():
    torch.manual_seed(0)
    linears = [nn.Linear(16, 8, bias=False), nn.Linear(16, 24, bias=False)]
    plain = [linear.weight.detach().clone() for linear in linears]
    projection = Projection(linears, frozenset())
    pair = LoRAPair(torch.randn(4, 16), torch.randn(24, 4))
    with torch.inference_mode():
        projection.merge([None, pair])
        projection.uses_merged = True
        x = torch.randn(1, 3, 16)
        first, second = linears[0](x), linears[1](x)
    torch.testing.assert_close(first, x @ plain[0].T)
    torch.testing.assert_close(second, x @ (plain[1] + pair.b @ pair.a).T, rtol=1e-5, atol=1e-5)


@pytest.fixture
def _no_second_merge(monkeypatch):
    """Tiny models are merged within milliseconds, and steps of one adapter soon have taken longer."""
    monkeypatch.setattr(merging, "_STRETCH", 1e9)


def requests(key, prompts, name="", new=NEW):
    params = SamplingParams(max_new_tokens=new)
    return [
        InferenceRequest(id=f"{name}{number}", prompt=tuple(prompt), adapter=key, params=params)
        for number, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def prompts():
    rng = random.Random(5)
    return [[rng.randrange(256) for _ in range(length)] for length in (1, 4, 30, 9)]


@pytest.mark.usefixtures("_no_second_merge")
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gpt2", "phi3"])
def test_merged_and_mixed_steps_take_turns_and_all_say_what_peft_says(architecture, kind, prompts):
    model = kind(architecture)
    harness = Harness(model.base, max_num_seqs=4, max_loras=2, lora_mode=LoRAMode.MERGED)
    keys = [harness.adapter(path) for path in model.adapters[:3]]
    for round_number, wanted in enumerate([(0,), (0, 1), (None,), (0,), (1, 2), (0,)]):
        harness.stats.clear()
        asked = {one: requests(None if one is None else keys[one], prompts, f"{one}-") for one in wanted}
        done = harness.run(request for own in asked.values() for request in own)
        merged = [stats.merged for stats in harness.stats]
        assert all(merged) if wanted == (0,) else not all(merged), round_number
        for one, own in asked.items():
            for request in own:
                answer = list(done[request.id].token_ids)
                assert answer == model.greedy(one, list(request.prompt), answer), (round_number, request.id)


def test_the_base_is_the_same_to_the_last_bit_after_any_merges(kind, prompts):
    model = kind("llama")
    harness = Harness(model.base, lora_mode=LoRAMode.MERGED)
    key = harness.adapter(model.adapters[1])
    params = SamplingParams(max_new_tokens=NEW, details=True)

    def base_says(name):
        asked = [InferenceRequest(id=name, prompt=tuple(prompts[2]), params=params)]
        done = harness.run(asked)[name]
        return done.token_ids, done.log_probs

    before = base_says("before")
    harness.run(requests(key, prompts))
    assert any(stats.merged for stats in harness.stats)
    assert base_says("after") == before


@pytest.mark.usefixtures("_no_second_merge")
def test_another_adapter_in_the_slot_of_the_merged_one_is_not_taken_for_it(kind, prompts):
    model = kind("llama")
    harness = Harness(model.base, max_loras=1, lora_mode=LoRAMode.MERGED)
    keys = [harness.adapter(path) for path in model.adapters[:2]]
    for round_number, one in enumerate([0, 1, 0, 1]):
        done = harness.run(requests(keys[one], prompts, f"{round_number}-"))
        for number, prompt in enumerate(prompts):
            answer = list(done[f"{round_number}-{number}"].token_ids)
            assert answer == model.greedy(one, prompt, answer)
        assert harness.stats[-1].merged == (one == 0)


def test_without_memory_to_merge_rows_go_on_unmerged(kind, prompts, monkeypatch):
    model = kind("llama")
    harness = Harness(model.base, lora_mode=LoRAMode.MERGED)
    key = harness.adapter(model.adapters[0])

    def no_memory(self, pairs):
        if any(pairs):
            raise MemoryError

    monkeypatch.setattr(Projection, "merge", no_memory)
    done = harness.run(requests(key, prompts))
    assert not any(stats.merged for stats in harness.stats)
    for number, prompt in enumerate(prompts):
        answer = list(done[str(number)].token_ids)
        assert answer == model.greedy(0, prompt, answer)


def test_an_adapter_that_does_more_than_add_stays_unmerged_and_says_what_peft_says(tmp_path, prompts):
    base = tiny.make_base(tmp_path / "base")
    paths = [
        tiny.make_adapter(tmp_path / name, base, seed=seed, r=4, target_modules=tiny.MLP, **more)
        for seed, (name, more) in enumerate({"plain": {}, "dora": {"use_dora": True}}.items(), 1)
    ]
    harness = Harness(base, lora_mode=LoRAMode.MERGED)
    plain, dora = (harness.adapter(path) for path in paths)
    for key, path, merges in ((dora, paths[1], False), (plain, paths[0], True), (dora, paths[1], False)):
        harness.stats.clear()
        done = harness.run(requests(key, prompts))
        assert any(stats.merged for stats in harness.stats) == merges
        expected = tiny.peft_generate(base, path, prompts, NEW)
        assert [list(done[str(number)].token_ids) for number in range(len(prompts))] == expected
