"""What adapters may do to a model that several ranks share: all that is plain LoRA, and nothing else."""

import itertools
import json
import warnings

import pytest

from tests import parity, tiny
from tests.engine.harness import Harness
from tests.engine.ranks import ParallelHarness
from worker.engine.merging import LoRAMode
from worker.errors import AdapterInvalid, ModelError, PromptTooLong
from worker.jobs import InferenceRequest, SamplingParams

NEW = 10
FACTORS = (2.0, 3.0)
PROMPTS = [(1, 2, 3), (7,) * 9, tuple(range(60, 130))]
PLAIN = ["LoRA", "all-linear, rslora, patterns"]
MORE = [name for name, feature in parity.FEATURES.items() if feature.needs != "tied" and name not in PLAIN]


def rows(keys, prompts=PROMPTS):
    params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
    return [
        InferenceRequest(id=f"{name}/{row}", prompt=prompt, adapter=key, params=params)
        for (name, key), (row, prompt) in itertools.product(keys.items(), enumerate(prompts))
    ]


def said(harness, keys):
    return {name: done.token_ids for name, done in harness.run(rows(keys)).items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make_base(tmp_path_factory.mktemp("kinds") / "base", "qwen2")


@pytest.fixture(scope="module")
def shared(base):
    with ParallelHarness(base, max_num_seqs=16) as harness:
        yield harness


@pytest.fixture(scope="module")
def alone(base):
    return Harness(base, max_num_seqs=16)


@pytest.fixture
def make(base, tmp_path):
    """PEFT's adapter of this feature."""

    def tune(feature):
        with warnings.catch_warnings(action="ignore"):
            plain = tiny.load_base(base)
            return parity.tune(plain, parity.SHAPES["qwen2"], feature, tmp_path / "tone", 1)

    return tune


@pytest.mark.parametrize("name", MORE)
def test_an_adapter_that_changes_modules_is_refused_and_says_why(name, make, shared, alone):
    folder = make(parity.FEATURES[name]).folder
    with pytest.raises(AdapterInvalid) as caught:
        shared.adapter(folder)
    assert "with tensor_parallel_degree above 1 adapters can only add to linear modules" in str(caught.value)
    assert caught.value.kind == "modules"
    alone.adapter(folder, version=name)  # which is why it is refused, and for nothing else


@pytest.mark.parametrize("name", PLAIN)
def test_every_kind_of_plain_lora_is_served(name, make, shared):
    tuned = make(parity.FEATURES[name])
    done = said(shared, {"own": shared.adapter(tuned.folder, version=name), "base": None})
    for row, prompt in enumerate(PROMPTS):
        answer = list(done[f"own/{row}"])
        assert answer == parity.says(tuned.model, [*prompt], answer)
    assert any(done[f"base/{row}"] != done[f"own/{row}"] for row in range(len(PROMPTS)))


def test_copies_of_the_base_models_own_embedding_and_head_change_nothing(make, shared, base):
    tuned = make(parity.FEATURES["LoRA"])
    before = (tuned.folder / "adapter_model.safetensors").stat().st_size
    with warnings.catch_warnings(action="ignore"):
        tuned.model.save_pretrained(tuned.folder, save_embedding_layers=True)
    copied = (tuned.folder / "adapter_model.safetensors").stat().st_size - before
    assert copied > 2 * 272 * 64 * 4
    key = shared.adapter(tuned.folder, version="copies")
    assert not shared.store.weights(key).changes
    done = said(shared, {"own": key})
    for row, prompt in enumerate(PROMPTS):
        answer = list(done[f"own/{row}"])
        assert answer == parity.says(tuned.model, [*prompt], answer)


def test_an_adapters_own_tokenizer_writes_its_text(make, shared):
    folder = make(parity.FEATURES["LoRA"]).folder
    tiny.write_tokenizer(folder, [])
    key = shared.adapter(folder, version="tokenizer")
    own = shared.store.weights(key).tokenizer
    assert own is not None
    done = shared.run(rows({"own": key}))
    assert all(completion.text == own.decode(completion.token_ids) for completion in done.values())


@pytest.mark.parametrize("fully", [True, False])
def test_rows_whose_positions_are_scaled_differently_say_what_they_say_on_one_device(fully, tmp_path):
    base, folders = tiny.make_base(tmp_path / "base", "llama"), {}
    for number, factor in enumerate((1.0, *FACTORS)):
        folder = tiny.make_adapter(tmp_path / f"by{factor:g}", base, seed=number, r=4, scale=2.0)
        config = json.loads((folder / "adapter_config.json").read_text())
        scaling = {"rope_scaling": {"rope_type": "linear", "factor": factor}}
        (folder / "adapter_config.json").write_text(json.dumps(config | scaling))
        folders[factor] = folder
    options = {"rope_factors": FACTORS, "max_loras": 2, "max_num_seqs": 5}
    one = Harness(base, **options)

    def keys(harness):
        return {None: None, **{factor: harness.adapter(own) for factor, own in folders.items()}}

    expected = said(one, keys(one))
    assert len(set(expected.values())) == len(expected)
    with ParallelHarness(base, fully_sharded=fully, **options) as harness:
        own = keys(harness)
        assert said(harness, own) == expected
        assert harness.stats[-1].slot_evictions > 0
        factors = [runner.executor.rope_factors for runner in harness.runners[1:]]
        assert all(set(one.values()) & {*FACTORS} for one in factors)
        long = rows({"long": own[2.0]}, [(5,) * 300])
        assert harness.run(long)["long/0"].failure is None
        with pytest.raises(PromptTooLong):
            harness.engine.add(rows({"long": own[1.0]}, [(5,) * 300])[0])


def test_positions_that_do_not_scale_are_refused_on_ranks_too(kind):
    with pytest.raises(ModelError, match="cannot have long_lora_scaling_factors: its positions"):
        ParallelHarness(kind("gemma3").base, rope_factors=FACTORS)


@pytest.mark.parametrize("mode", [LoRAMode.AUTO, LoRAMode.MERGED])
def test_nothing_is_merged_into_a_shared_model(mode, base):
    with pytest.raises(AssertionError, match="settings are checked"):
        ParallelHarness(base, lora_mode=mode)
