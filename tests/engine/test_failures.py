"""Trouble in the forward pass: whose row fails, and that everything after it is right."""

import pytest
import torch

from worker.engine import lora_layers
from worker.engine.adapters.adapter import LoRAPair, LoRAWeights
from worker.engine.lora_plan import Way
from worker.errors import EngineFailed
from worker.jobs import AdapterKey, FinishReason, InferenceRequest, SamplingParams

POISON = 271
PROMPTS = [(72, 101, 108), (1,), (200, 7, 9, 11), tuple(range(40, 52)), (33, 33)]


def request(name, prompt, adapter=None, **params):
    params = {"max_new_tokens": 6, "ignore_eos": True, **params}
    return InferenceRequest(id=name, prompt=tuple(prompt), adapter=adapter, params=SamplingParams(**params))


def healthy(adapters=(None,)):
    return [request(f"row{n}", prompt, adapters[n % len(adapters)]) for n, prompt in enumerate(PROMPTS)]


def tokens(completions):
    return {name: done.token_ids for name, done in completions.items() if done.failure is None}


@pytest.fixture
def harness(llama, make_harness):
    return make_harness(llama, max_num_seqs=8)


@pytest.fixture
def hook(harness):
    """Put a function of token ids and embeddings behind the embedding, for the length of a test."""
    handles = []

    def put(function):
        embedding = harness.base.model.get_input_embeddings()
        handles.append(embedding.register_forward_hook(lambda _m, args, out: function(args[0][0], out[0])))
        return handles[-1]

    yield put
    for handle in handles:
        handle.remove()


def raise_on_poison(ids, _embedded):
    if (ids == POISON).any():
        raise RuntimeError("poisoned")


def nan_on_poison(ids, embedded):
    embedded[ids == POISON] = torch.nan


def assert_failed(completion, code="internal"):
    assert completion.finish_reason is FinishReason.ERROR
    assert completion.failure.code == code


def assert_free(harness):
    completions, stats = harness.engine.step()
    assert completions == []
    assert stats.free_blocks == harness.runner.cache_shape.num_blocks
    assert (stats.running, stats.waiting) == (0, 0)
    harness.engine.check_integrity()


@pytest.mark.parametrize("place", [0, 2, 5])
def test_forward_that_raises_fails_the_row_that_made_it_raise(place, harness, hook, adapters):
    keys = [None, harness.adapter(adapters[0])]
    expected = tokens(harness.run(healthy(keys)))
    assert not any(POISON in own for own in expected.values())
    hook(raise_on_poison)
    rows = healthy(keys)
    rows.insert(place, request("bad", [5, POISON, 6]))
    done = harness.run(rows)
    assert_failed(done["bad"])
    assert "poisoned" in done["bad"].failure.message
    assert done["bad"].failure.retryable
    assert tokens(done) == expected
    assert_free(harness)


def test_row_that_raises_in_the_middle_of_its_prompt_fails_alone(llama, make_harness):
    small = make_harness(llama, max_num_seqs=4, max_num_batched_tokens=8)
    expected = tokens(small.run(healthy()))
    small.base.model.get_input_embeddings().register_forward_hook(
        lambda _m, args, out: raise_on_poison(args[0][0], out)
    )
    done = small.run([*healthy(), request("bad", [*range(30), POISON])])
    assert_failed(done["bad"])
    assert tokens(done) == expected
    assert_free(small)


def test_row_that_raises_after_some_tokens_keeps_them(harness, hook):
    (plain,) = harness.run([request("row", PROMPTS[0])]).values()
    calls = []

    def third_time(_ids, _embedded):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("late")

    hook(third_time)
    (done,) = harness.run([request("row", PROMPTS[0])]).values()
    assert_failed(done)
    assert done.token_ids == plain.token_ids[:2]


def test_next_batch_is_right_after_a_forward_that_raised(harness, hook, adapters):
    keys = [None, *map(harness.adapter, adapters[:2])]
    expected = tokens(harness.run(healthy(keys)))
    handle = hook(raise_on_poison)
    harness.run([request("bad", [POISON], keys[1])])
    handle.remove()
    assert tokens(harness.run(healthy(keys))) == expected


def test_plans_are_taken_back_after_a_forward_that_raised(harness, hook, adapters):
    key = harness.adapter(adapters[0])
    hook(raise_on_poison)
    harness.run([request("bad", [POISON, 4], key)])
    assert harness.runner._executor.lora.step is None
    assert harness.runner._attention.plan is None
    with pytest.raises(AssertionError, match="outside of a step"):
        harness.base.model(torch.tensor([[1, 2]]), use_cache=False)


# What is not finite


@pytest.mark.parametrize("place", [0, 2, 5])
def test_row_whose_output_is_not_finite_fails_alone(place, harness, hook, adapters):
    keys = [None, harness.adapter(adapters[0])]
    expected = tokens(harness.run(healthy(keys)))
    hook(nan_on_poison)
    rows = healthy(keys)
    rows.insert(place, request("bad", [5, POISON, 6]))
    done = harness.run(rows)
    assert_failed(done["bad"])
    assert "not finite" in done["bad"].failure.message
    assert tokens(done) == expected
    assert_free(harness)


def test_cache_is_clean_for_the_next_row_after_one_that_was_not_finite(llama, make_harness):
    harness = make_harness(llama, max_num_seqs=1)
    expected = tokens(harness.run(healthy()))
    handle = harness.base.model.get_input_embeddings().register_forward_hook(
        lambda _m, args, out: nan_on_poison(args[0][0], out[0])
    )
    assert_failed(harness.run([request("bad", [POISON] * 40)])["bad"])
    handle.remove()
    assert tokens(harness.run(healthy())) == expected


@pytest.mark.parametrize("leave", ["abort", "preempt", "raise"])
def test_cache_is_clean_after_a_row_that_left_in_the_middle_of_its_prompt(leave, llama, make_harness):
    """Before its end nobody has to have looked at its logits."""
    harness = make_harness(llama, max_num_seqs=1, max_num_batched_tokens=8)
    engine = harness.engine
    expected = tokens(harness.run(healthy()))
    embedding = harness.base.model.get_input_embeddings()
    handles = [embedding.register_forward_hook(lambda _m, args, out: nan_on_poison(args[0][0], out[0]))]
    engine.add(request("bad", [POISON] * 40))
    ended = [done for _ in range(2) for done in engine.step()[0]]
    if leave == "preempt":
        for sequence in list(engine._scheduler.running):
            engine._scheduler.preempt(sequence)
    if leave == "raise":
        handles.append(
            embedding.register_forward_hook(lambda _m, args, out: raise_on_poison(args[0][0], out))
        )
        ended += harness.drain().values()
        assert_failed(ended[0])
    engine.abort("bad")
    for handle in handles:
        handle.remove()
    assert tokens(harness.run(healthy())) == expected


def give(harness, name, a, b=1.0):
    """An adapter of constant weights on every q_proj, as if it had been loaded."""
    key = AdapterKey(name, "1")
    assert harness.store.reserve(key)
    weights = LoRAWeights(
        key,
        {
            module: LoRAPair(
                torch.full((2, target.in_features), a, dtype=harness.base.dtype),
                torch.full((target.out_features, 2), b, dtype=harness.base.dtype),
            )
            for module, target in harness.runner.targets.items()
            if module.endswith("q_proj")
        },
    )
    harness.store._loader = lambda _key, _folder: weights
    harness.store.load(key, None)
    return key


@pytest.mark.parametrize("way", Way)
@pytest.mark.parametrize(("dtype", "large"), [("float32", 3e38), ("bfloat16", 3e38), ("float16", 6e4)])
def test_adapter_that_overflows_fails_its_own_rows_only(dtype, large, way, llama, make_harness, monkeypatch):
    monkeypatch.setattr(lora_layers, "cheapest", lambda *_: way)
    harness = make_harness(llama, max_num_seqs=8, dtype=dtype)
    mild, milder = give(harness, "mild", 0.01), give(harness, "milder", -0.02)
    huge = give(harness, "huge", large, large)
    expected = tokens(harness.run(healthy([None, mild, milder])))
    assert len(expected) == len(PROMPTS)
    rows = healthy([None, mild, milder])
    rows[2:2] = [request("bad", PROMPTS[0], huge), request("bad2", PROMPTS[3], huge)]
    done = harness.run(rows)
    assert_failed(done["bad"])
    assert_failed(done["bad2"])
    assert tokens(done) == expected
    assert tokens(harness.run(healthy([None, mild, milder]))) == expected


# Memory


def test_out_of_memory_halves_the_batch_until_it_fits(harness, hook, adapters):
    keys = [None, *map(harness.adapter, adapters[:2])]
    expected = tokens(harness.run(healthy(keys)))
    sizes = []

    def small_device(ids, _embedded):
        sizes.append(len(ids))
        if len(ids) > 12:
            raise torch.OutOfMemoryError("too many tokens")

    hook(small_device)
    assert tokens(harness.run(healthy(keys))) == expected
    assert max(sizes) > 12
    assert_free(harness)


def test_row_that_does_not_fit_by_itself_fails_for_lack_of_memory(harness, hook):
    def small_device(ids, _embedded):
        if len(ids) > 20:
            raise torch.OutOfMemoryError("too many tokens")

    expected = tokens(harness.run(healthy()))
    hook(small_device)
    done = harness.run([*healthy(), request("large", range(30))])
    assert_failed(done["large"], code="oom")
    assert done["large"].failure.retryable
    assert tokens(done) == expected


@pytest.mark.parametrize(("error", "code"), [(torch.OutOfMemoryError, "oom"), (RuntimeError, "internal")])
def test_adapter_that_cannot_be_put_into_its_slot_fails_its_own_rows_only(
    error, code, harness, adapters, monkeypatch
):
    bad, fine = map(harness.adapter, adapters[:2])
    expected = tokens(harness.run(healthy([None, fine])))
    put = harness.runner.put_adapter

    def put_but_one(slot, weights):
        if weights.key == bad:
            raise error("no room")
        put(slot, weights)

    with monkeypatch.context() as patch:
        patch.setattr(harness.runner, "put_adapter", put_but_one)
        done = harness.run([request("bad", PROMPTS[0], bad), *healthy([None, fine])])
    assert_failed(done["bad"], code)
    assert tokens(done) == expected
    assert_free(harness)
    # Nor is the slot held to have it from now on.
    again = harness.run([request("again", PROMPTS[0], bad), request("base", PROMPTS[0])])
    assert again["again"].failure is None
    assert again["again"].token_ids != again["base"].token_ids


# The end of the engine


def test_rows_that_fail_alone_one_after_another_do_not_end_an_engine_that_is_sound(harness, hook):
    hook(raise_on_poison)
    for number in range(7):
        assert_failed(harness.run([request(f"bad{number}", [POISON])])[f"bad{number}"])
    alone = harness.run([request("good", PROMPTS[0])])["good"]
    assert alone.failure is None


def test_three_rows_that_fail_alone_end_an_engine_that_is_not_sound(harness, hook, monkeypatch):
    hook(raise_on_poison)
    monkeypatch.setattr(harness.runner, "is_sound", lambda: False)
    for number in range(2):
        assert_failed(harness.run([request(f"bad{number}", [POISON])])[f"bad{number}"])
    with pytest.raises(EngineFailed, match="3 rows failed one after another: poisoned"):
        harness.run([request("bad2", [POISON])])


def test_engine_that_always_raises_ends(harness, hook):
    def broken(_ids, _embedded):
        raise RuntimeError("broken for good")

    hook(broken)
    with pytest.raises(EngineFailed, match="broken for good"):
        harness.run(healthy())


def test_batch_that_works_starts_the_count_anew(harness, hook):
    hook(raise_on_poison)
    for number in range(6):
        assert_failed(harness.run([request("bad", [POISON])])["bad"])
        if number % 2:
            assert harness.run([request("good", [1, 2])])["good"].failure is None


def test_rows_that_fail_among_rows_that_work_do_not_end_the_engine(harness, hook):
    """In one step: halves that work lie between the rows that fail."""
    hook(raise_on_poison)
    rows = [own for n in range(4) for own in (request(f"bad{n}", [POISON]), request(f"good{n}", [n + 1]))]
    done = harness.run(rows)
    assert {name for name, own in done.items() if own.failure is None} == {f"good{n}" for n in range(4)}
    assert len(done) == 8


def test_rows_that_are_not_finite_never_end_the_engine(harness, hook):
    hook(nan_on_poison)
    for number in range(5):
        assert_failed(harness.run([request(f"bad{number}", [POISON])])[f"bad{number}"])
