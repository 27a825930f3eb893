"""Rows of one batch whose positions are scaled differently say what each says alone in transformers."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from tests import tiny
from tests.engine.harness import Harness
from worker.engine.model_runner import CacheShape
from worker.engine.rope import RopeScaling, read_factor, scaled_positions
from worker.errors import AdapterInvalid, ModelError, PromptTooLong
from worker.jobs import AdapterKey, InferenceRequest, SamplingParams

FACTORS = (2.0, 3.0, 4.0)
NATIVE = 160
ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3"]


@pytest.fixture(scope="module")
def adapters(kind, tmp_path_factory):
    """By architecture, its base and adapters that differ in what they say of their positions."""

    def make(architecture: str) -> tuple[Path, dict[float, Path]]:
        model, folder = kind(architecture), tmp_path_factory.mktemp(architecture)
        said: dict[float, dict[str, Any]] = {
            1.0: {},
            2.0: {"context_length": 2 * NATIVE},
            3.0: {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
            4.0: {"context_length": 3 * NATIVE + 1},
        }
        targets = tiny.ARCHITECTURES[architecture][2]
        made = {}
        for number, (factor, own) in enumerate(said.items()):
            made[factor] = tiny.make_adapter(
                folder / f"by{factor:g}", model.base, seed=number, r=4, target_modules=targets
            )
            say(made[factor], **own)
        return model.base, made

    return make


def say(adapter: Path, **own: Any) -> Path:
    """Have an adapter's configuration say this too."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    return adapter


def alone(base: Path, adapter: Path | None, factor: float, prompt: list[int], new: int) -> list[int]:
    """What transformers, with PEFT's adapter and linear scaling, makes of a prompt, greedily."""
    config = AutoConfig.from_pretrained(base)
    if factor != 1.0:
        config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": factor}
    config.max_position_embeddings = int(NATIVE * factor)
    model: Any = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32).eval()
    if adapter is not None:
        with warnings.catch_warnings():  # PEFT does not know what vLLM's users write there
            warnings.filterwarnings("ignore", "Unexpected keyword arguments")
            model = PeftModel.from_pretrained(model, adapter).eval()
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=new, pad_token_id=256,
        )  # fmt: skip
    return output[0, len(prompt) :].tolist()


def requests(
    keys: dict[float | None, AdapterKey | None], prompts: list[list[int]], new: int
) -> list[InferenceRequest]:
    return [
        InferenceRequest(
            id=f"{factor}/{number}",
            prompt=tuple(prompt),
            adapter=key,
            params=SamplingParams(max_new_tokens=new),
        )
        for number, prompt in enumerate(prompts)
        for factor, key in keys.items()
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_of_different_scaling_say_what_they_say_alone(architecture, adapters):
    base, made = adapters(architecture)
    harness = Harness(base, max_num_seqs=5, max_num_batched_tokens=40, rope_factors=FACTORS)
    keys: dict[Any, Any] = {None: None, **{factor: harness.adapter(path) for factor, path in made.items()}}
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(256, (length,), generator=generator).tolist() for length in (3, 30, 90)]
    completions = harness.run(requests(keys, prompts, 10))
    assert max(stats.adapters for stats in harness.stats) > 2
    for number, prompt in enumerate(prompts):
        for factor, path in ((None, None), *made.items()):
            expected = alone(base, path, factor or 1.0, prompt, 10)
            assert list(completions[f"{factor}/{number}"].token_ids) == expected, (factor, number)


def test_the_factor_makes_a_difference_and_to_its_own_rows_alone(adapters):
    base, made = adapters("llama")
    prompt = list(range(100))
    plain = harness_text(Harness(base), made[1.0], prompt)
    assert harness_text(Harness(base, rope_factors=FACTORS), made[1.0], prompt) == plain
    assert alone(base, made[2.0], 2.0, prompt, 10) != alone(base, made[2.0], 1.0, prompt, 10)


def harness_text(harness: Harness, adapter: Path, prompt: list[int]) -> tuple[int, ...]:
    key = harness.adapter(adapter)
    params = SamplingParams(max_new_tokens=10)
    done = harness.run([InferenceRequest(id="0", prompt=tuple(prompt), adapter=key, params=params)])
    return done["0"].token_ids


@pytest.mark.parametrize("shape", [None, CacheShape(80, 16)], ids=["whole", "paged"])
def test_a_row_may_be_as_long_as_its_own_factor_allows(adapters, shape):
    base, made = adapters("llama")
    harness = Harness(base, rope_factors=FACTORS, cache_shape=shape)
    assert harness.engine.max_model_len == 4 * NATIVE
    long = [number % 250 for number in range(2 * NATIVE - 10)]
    keys = {factor: harness.adapter(path) for factor, path in made.items()}
    completions = harness.run(requests({2.0: keys[2.0]}, [long], 10))
    assert list(completions["2.0/0"].token_ids) == alone(base, made[2.0], 2.0, long, 10)
    for key in (None, keys[1.0], keys[2.0]):
        limit = 2 * NATIVE if key == keys[2.0] else NATIVE
        with pytest.raises(PromptTooLong, match=rf"limit \(max_model_len\) is {limit}"):
            harness.engine.add(requests({1.0: key}, [long], 11)[0])
    assert harness.engine.max_len(None) == NATIVE
    assert [harness.engine.max_len(key) for key in keys.values()] == [NATIVE, 320, 480, 640]


def test_a_row_that_fills_what_there_is_fills_what_its_own_factor_allows(adapters):
    base, made = adapters("llama")
    harness = Harness(base, rope_factors=FACTORS)
    params = SamplingParams(max_new_tokens=harness.engine.max_model_len - 100, ignore_eos=True)
    keys = {f"{factor:g}": harness.adapter(path) for factor, path in made.items() if factor < 3}
    rows = [
        InferenceRequest(id=name, prompt=(1,) * 100, adapter=key, params=params, fills=True)
        for name, key in {**keys, "base": None}.items()
    ]
    for row in rows:
        harness.engine.check(row)  # as whoever hands it to the engine's thread does
    completions = harness.run(rows)
    lengths = {name: len(done.token_ids) for name, done in completions.items()}
    assert lengths == {"1": 60, "2": 220, "base": 60}


def test_max_model_len_bounds_every_factor(adapters):
    base, made = adapters("llama")
    harness = Harness(base, rope_factors=FACTORS, max_model_len=200)
    keys = {factor: harness.adapter(path) for factor, path in made.items()}
    assert [harness.engine.max_len(key) for key in keys.values()] == [NATIVE, 200, 200, 200]
    with pytest.raises(ModelError, match="max_model_len is 641, the base model's limit is 160 times 4"):
        Harness(base, rope_factors=FACTORS, max_model_len=641)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"context_length": 5 * NATIVE}, "context_length 800 of 160 tokens needs the factor 5; .*2, 3, 4"),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}}, "needs the factor 2.5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "is not linear"),
        ({"rope_scaling": {"factor": "many"}}, "cannot be read"),
        ({"context_length": "long"}, "cannot be read"),
    ],
)
def test_a_factor_that_rows_may_not_have_refuses_the_adapter(adapters, said, message):
    base, made = adapters("llama")
    harness = Harness(base, rope_factors=FACTORS)
    with pytest.raises(AdapterInvalid, match=message):
        harness.adapter(say(made[1.0], **said))


def test_without_factors_an_adapter_that_needs_one_is_refused(adapters):
    base, made = adapters("llama")
    with pytest.raises(AdapterInvalid, match=r"needs the factor 3; long_lora_scaling_factors has none"):
        Harness(base).adapter(made[3.0])


def test_an_adapter_of_the_base_models_own_length_needs_no_factor():
    assert read_factor({"context_length": NATIVE}, RopeScaling((), NATIVE)) == 1.0
    assert read_factor({"rope_scaling": None, "context_length": None}, RopeScaling((), NATIVE)) == 1.0


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "gemma3"])
def test_a_model_whose_positions_do_not_scale_is_refused(kind, architecture):
    with pytest.raises(ModelError, match="cannot have long_lora_scaling_factors: its positions"):
        Harness(kind(architecture).base, rope_factors=FACTORS)


def test_a_model_that_is_scaled_already_is_refused(tmp_path):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ModelError, match="its rope_type is linear, default is needed"):
        Harness(tiny.make_base(tmp_path / "base", rope_parameters=rope), rope_factors=FACTORS)


def test_positions_of_each_row_are_divided_by_its_own_factor():
    positions = torch.tensor([0, 1, 2, 7, 4, 5])
    assert scaled_positions(positions, [1.0, 2.0, 4.0], [3, 1, 2]).tolist() == [0, 1, 2, 3.5, 1, 1.25]
    whole = scaled_positions(positions, [1.0, 1.0], [3, 3])
    assert whole.dtype == torch.float32
    assert math.isclose(float(whole.sum()), 19)
