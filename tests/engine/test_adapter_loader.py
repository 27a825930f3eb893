"""An adapter folder is applied whole, as PEFT means it, or refused by the name of what is wrong."""

import itertools
import json
import shutil
import struct
import warnings

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import tiny
from worker.engine.adapters.loader import CONFIG_FILE, WEIGHTS_FILE, AdapterLoader, _Remembered
from worker.engine.base_model import load_base_model
from worker.engine.limits import EngineLimits
from worker.engine.model_runner import ModelRunner
from worker.errors import AdapterInvalid
from worker.jobs import AdapterKey

KEY = AdapterKey("tone", "1")
Q_PROJ = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def targets(llama):
    base = load_base_model(llama, device=torch.device("cpu"))
    return ModelRunner(base, EngineLimits(1, 64, 1, 64, torch.float32)).targets


@pytest.fixture(scope="module")
def saved(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "tone"
    return tiny.make_adapter(folder, llama, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "tone")


def change_config(folder, **changes):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, **changes):
    """Replace tensors of the q_proj in layer 1 by what a function makes of them; None takes one out."""
    tensors = load_file(folder / WEIGHTS_FILE)
    for side, change in changes.items():
        name = f"{Q_PROJ}.lora_{side}.weight"
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / WEIGHTS_FILE)


def load(folder, targets, *, max_lora_rank=64, dtype=torch.float32):
    return AdapterLoader(targets, max_lora_rank=max_lora_rank, dtype=dtype)(KEY, folder)


def refusal(folder, targets, **options):
    """Why the adapter in `folder` is refused; always by name."""
    with pytest.raises(AdapterInvalid) as caught:
        load(folder, targets, **options)
    assert str(caught.value).startswith("Adapter tone is invalid: ")
    return str(caught.value)


def put(index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


def test_untouched_adapter_is_taken_whole(folder, targets):
    weights = load(folder, targets)
    assert weights.key == KEY
    assert len(weights.pairs) == 6
    assert weights.rank == 4
    assert weights.num_bytes == sum(a.nbytes + b.nbytes for a, b in weights.pairs.values())


# Tensors


def test_weights_do_not_change_with_the_file(folder, targets):
    weights = load(folder, targets)
    before = {name: [tensor.clone() for tensor in pair] for name, pair in weights.pairs.items()}
    path = folder / WEIGHTS_FILE
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(bytes(size))
    for name, pair in weights.pairs.items():
        assert all(map(torch.equal, pair, before[name]))


def test_extra_tensor_is_refused_by_name(folder, targets):
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 64)
    save_file(tensors, folder / WEIGHTS_FILE)
    assert "model.layers.0.mlp.up_proj.lora_A.weight belongs to no module" in refusal(folder, targets)


def test_dora_magnitude_without_its_setting_is_refused(folder, targets):
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors[f"{Q_PROJ}.lora_magnitude_vector"] = torch.ones(64)
    save_file(tensors, folder / WEIGHTS_FILE)
    assert "lora_magnitude_vector belongs to no module" in refusal(folder, targets)


@pytest.mark.parametrize("side", ["A", "B"])
def test_missing_tensor_is_refused_by_name(side, folder, targets):
    change_tensors(folder, **{side: None})
    assert f"tensor {Q_PROJ}.lora_{side}.weight is missing" in refusal(folder, targets)


@pytest.mark.parametrize(
    ("side", "change", "shapes"),
    [
        ("A", lambda a: a[:, :63], "[4, 63], the base model needs [4, 64]"),
        ("A", lambda a: a[:3], "[3, 64], the base model needs [4, 64]"),
        ("A", lambda a: a.T, "[64, 4], the base model needs [4, 64]"),
        ("A", torch.flatten, "[256], the base model needs [4, 64]"),
        ("B", lambda b: b[:63], "[63, 4], the base model needs [64, 4]"),
        ("B", lambda b: b.unsqueeze(0), "[1, 64, 4], the base model needs [64, 4]"),
    ],
)
def test_wrong_shape_is_refused_with_both_shapes(side, change, shapes, folder, targets):
    change_tensors(folder, **{side: change})
    assert f"tensor {Q_PROJ}.lora_{side}.weight has shape {shapes}" in refusal(folder, targets)


def test_other_base_model_of_the_same_kind_is_refused(llama, targets, tmp_path):
    config = json.loads((llama / "config.json").read_text()) | {"hidden_size": 32, "num_attention_heads": 2}
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(other)).save_pretrained(other)
    folder = tiny.make_adapter(tmp_path / "tone", other, r=4, target_modules=["q_proj"])
    assert "has shape [4, 32], the base model needs [4, 64]" in refusal(folder, targets)


def test_deeper_base_model_is_refused(folder, targets):
    tensors = load_file(folder / WEIGHTS_FILE)
    deeper = {name.replace("layers.2", "layers.3"): tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors | deeper, folder / WEIGHTS_FILE)
    assert "layers.3" in refusal(folder, targets)


def test_base_model_with_other_names_is_refused(targets, tmp_path):
    base = tiny.make_base(tmp_path / "gpt2", "gpt2")
    folder = tiny.make_adapter(tmp_path / "tone", base, r=4, target_modules=["c_fc"], fan_in_fan_out=True)
    assert "matches no module of the base model" in refusal(folder, targets)


def test_rank_above_the_limit_is_refused_with_both_numbers(folder, targets):
    assert "rank 4 of module" in refusal(folder, targets, max_lora_rank=3)
    assert "max_lora_rank 3" in refusal(folder, targets, max_lora_rank=3)
    assert load(folder, targets, max_lora_rank=4).rank == 4


def test_one_module_above_the_limit_is_refused(llama, targets, tmp_path):
    folder = tiny.make_adapter(
        tmp_path / "tone",
        llama,
        r=2,
        target_modules=["q_proj"],
        rank_pattern={"layers.2.self_attn.q_proj": 9},
    )
    assert "rank 9 of module model.layers.2.self_attn.q_proj" in refusal(folder, targets, max_lora_rank=8)


def test_config_of_another_rank_than_the_tensors_is_refused(folder, targets):
    change_config(folder, r=2)
    assert "has shape [4, 64], the base model needs [2, 64]" in refusal(folder, targets)


@pytest.mark.parametrize("rank", [0, -1])
def test_rank_below_one_is_refused(rank, folder, targets):
    change_config(folder, r=rank)
    refusal(folder, targets)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", ["A", "B"])
def test_weights_that_are_not_finite_are_refused(side, value, folder, targets):
    change_tensors(folder, **{side: put((1, 1), value)})
    assert "q_proj has weights that are not finite" in refusal(folder, targets)


def test_weights_that_overflow_only_when_cast_are_refused(folder, targets):
    change_tensors(folder, A=put((1, 1), 1e6))
    load(folder, targets)
    assert "not finite in torch.float16" in refusal(folder, targets, dtype=torch.float16)


def test_weights_that_overflow_only_when_scaled_are_refused(folder, targets):
    change_config(folder, lora_alpha=1e300)
    assert "not finite in torch.float32" in refusal(folder, targets)


@pytest.mark.parametrize(("dtype", "name"), [(torch.int8, "I8"), (torch.int64, "I64"), (torch.bool, "BOOL")])
@pytest.mark.parametrize("side", ["A", "B"])
def test_integer_tensors_are_refused(side, dtype, name, folder, targets):
    change_tensors(folder, **{side: lambda tensor: tensor.to(dtype)})
    assert f"lora_{side}.weight is of {name}, not of a floating-point type" in refusal(folder, targets)


# Files


def test_missing_weights_file_is_refused(folder, targets):
    (folder / WEIGHTS_FILE).unlink()
    assert WEIGHTS_FILE in refusal(folder, targets)


def test_pickled_weights_are_not_read(folder, targets):
    (folder / WEIGHTS_FILE).unlink()
    torch.save({}, folder / "adapter_model.bin")
    assert WEIGHTS_FILE in refusal(folder, targets)


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[:4],
        lambda whole: whole[:100],
        lambda whole: whole[:-1],
        lambda whole: whole + b"\0",
        lambda whole: struct.pack("<Q", 2**63) + whole[8:],
        lambda whole: struct.pack("<Q", len(whole)) + whole[8:],
        lambda whole: struct.pack("<Q", 2) + b"[]",
        lambda whole: struct.pack("<Q", 4) + b"\xff\xff\xff\xff",
        lambda whole: b"not safetensors at all, but long enough to look at",
    ],
)
def test_damaged_weights_file_is_refused(damage, folder, targets):
    path = folder / WEIGHTS_FILE
    path.write_bytes(damage(path.read_bytes()))
    assert f"{WEIGHTS_FILE} cannot be read" in refusal(folder, targets)


def test_missing_config_is_refused(folder, targets):
    (folder / CONFIG_FILE).unlink()
    assert CONFIG_FILE in refusal(folder, targets)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"LORA"', b"\xff\xfe", b"[" * 100_000, b'{"r": NaN}']
)
def test_config_that_is_no_object_of_json_is_refused(content, folder, targets):
    (folder / CONFIG_FILE).write_bytes(content)
    assert f"{CONFIG_FILE} cannot be read" in refusal(folder, targets)


def test_missing_folder_says_nothing_about_the_adapter(targets, tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"):
        load(tmp_path / "gone", targets)


# Configuration


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_parameters", ["model.layers.0.mlp.up_proj.weight"]),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("use_qalora", True),
        ("alora_invocation_tokens", [1, 2, 3]),
        ("megatron_config", {"model": 1}),
        ("setting_of_tomorrow", 1),
        ("setting_of_tomorrow", "some"),
        ("setting_of_tomorrow", {"deep": []}),
    ],
)
def test_setting_without_support_is_refused_by_name_and_value(name, value, folder, targets):
    change_config(folder, **{name: value})
    assert f"{name} is {value!r}, which is not supported" in refusal(folder, targets)


@pytest.mark.parametrize("value", [None, False, [], {}, "", 0, "none"])
def test_unknown_setting_without_value_does_no_harm(value, folder, targets):
    change_config(folder, setting_of_tomorrow=value)
    load(folder, targets)


@pytest.mark.parametrize(
    "value", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "unheard-of", ["gaussian"], 2]
)
def test_initialisation_that_changes_the_base_is_refused(value, folder, targets):
    change_config(folder, init_lora_weights=value)
    assert f"init_lora_weights is {value!r}" in refusal(folder, targets)


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "orthogonal"])
def test_initialisation_that_leaves_the_base_alone_is_taken(value, folder, targets):
    change_config(folder, init_lora_weights=value)
    load(folder, targets)


def test_eva_adapter_is_taken_without_a_warning(folder, targets):
    change_config(folder, init_lora_weights="eva", eva_config={"rho": 2.0})
    load(folder, targets)


@pytest.mark.parametrize(
    "value", ["SEQ_CLS", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", ["CAUSAL_LM"], {"a": 1}, 1]
)
def test_other_task_is_refused(value, folder, targets):
    change_config(folder, task_type=value)
    assert f"task_type is {value!r}" in refusal(folder, targets)


@pytest.mark.parametrize("value", ["IA3", "LOHA", "lora", None, ["LORA"], 1])
def test_other_method_is_refused(value, folder, targets):
    change_config(folder, peft_type=value)
    assert f"peft_type is {value!r}" in refusal(folder, targets)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", "4"),
        ("r", 4.5),
        ("r", None),
        ("lora_alpha", "8"),
        ("lora_alpha", None),
        ("use_rslora", "yes"),
        ("target_modules", 3),
        ("target_modules", [3]),
        ("target_modules", {"q_proj": True}),
        ("exclude_modules", 3),
        ("layers_to_transform", "all"),
        ("layers_to_transform", ["1"]),
        ("layers_pattern", 3),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": "4"}),
        ("alpha_pattern", {"q_proj": [1]}),
    ],
)
def test_setting_of_the_wrong_type_is_refused_by_name(name, value, folder, targets):
    change_config(folder, **{name: value})
    assert name in refusal(folder, targets)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ".*(q_proj"},
        {"exclude_modules": "[v_proj"},
        {"rank_pattern": {"*q_proj": 4}},
        {"alpha_pattern": {"(q_proj": 4}},
        # Right by itself, wrong where PEFT puts it: flags have to come first.
        {"rank_pattern": {"(?i)Q_PROJ": 4}},
        {"alpha_pattern": {"(?i)Q_PROJ": 4}},
        {"layers_to_transform": [0, 1, 2], "layers_pattern": "(layers"},
        {"layers_to_transform": [0, 1, 2], "layers_pattern": ["[layers"]},
    ],
)
def test_bad_pattern_is_refused(changes, folder, targets):
    change_config(folder, **changes)
    assert "regular expression" in refusal(folder, targets)


@pytest.mark.parametrize("value", [None, [], ""])
def test_no_target_at_all_is_refused(value, folder, targets):
    change_config(folder, target_modules=value)
    assert "target_modules is missing or empty" in refusal(folder, targets)


@pytest.mark.parametrize("value", [["query"], "query", ["proj"], "q_proj"])
def test_targets_that_match_nothing_are_refused(value, folder, targets):
    change_config(folder, target_modules=value)
    assert "matches no module of the base model" in refusal(folder, targets)


def test_layers_that_the_base_does_not_have_are_refused(folder, targets):
    change_config(folder, layers_to_transform=[7])
    assert "matches no module" in refusal(folder, targets)


def test_layers_of_a_regular_expression_are_refused_as_by_peft(folder, targets):
    change_config(folder, target_modules=".*q_proj", layers_to_transform=[0])
    assert "layers_to_transform" in refusal(folder, targets)


@pytest.mark.parametrize(
    ("module", "reason"),
    [("norm", "RMSNorm"), ("act_fn", "SiLUActivation"), ("rotary_emb", "RotaryEmbedding")],
)
def test_modules_of_other_kinds_are_refused_with_the_reason(module, reason, folder, targets):
    change_config(folder, target_modules=["q_proj", "v_proj", module])
    message = refusal(folder, targets)
    assert module in message
    assert reason in message


@pytest.mark.parametrize(
    "config",
    [
        {"layer_replication": [[0, 2], [1, 3]]},
    ],
    ids=lambda config: next(iter(config)),
)
def test_what_peft_itself_saves_without_our_support_is_refused(config, llama, targets, tmp_path):
    with warnings.catch_warnings(action="ignore"):
        folder = tiny.make_adapter(tmp_path / "tone", llama, r=4, target_modules=["q_proj"], **config)
    assert f"{next(iter(config))} is " in refusal(folder, targets)


# Meaning

EVERY = [*tiny.ATTENTION, *tiny.MLP]
MEANINGS = {
    "alpha": {"r": 4, "lora_alpha": 6},
    "odd-rank": {"r": 3, "lora_alpha": 1},
    "fraction": {"r": 7, "lora_alpha": 0.3},
    "rslora": {"r": 5, "lora_alpha": 6, "use_rslora": True},
    "rank-pattern": {"r": 4, "lora_alpha": 6, "rank_pattern": {"q_proj": 2, r"layers\.1\..*up_proj": 7}},
    "alpha-pattern": {"r": 4, "lora_alpha": 6, "alpha_pattern": {"v_proj": 32, "layers.0.mlp.up_proj": 1}},
    "both-rslora": {
        "r": 4,
        "use_rslora": True,
        "rank_pattern": {r".*\.2\.self_attn.*": 3},
        "alpha_pattern": {"self_attn.o_proj": 5, "down_proj": 9},
    },
    "first-pattern-wins": {"r": 4, "rank_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 6}},
    "layers": {"r": 2, "layers_to_transform": [1]},
    "one-layer": {"r": 2, "layers_to_transform": 2},
    "layers-pattern": {"r": 2, "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "excluded": {"r": 2, "exclude_modules": ["down_proj", "layers.0.self_attn.q_proj"]},
    "excluded-by-pattern": {"r": 2, "exclude_modules": r".*\.[02]\..*"},
    "regular-expression": {"r": 2, "target_modules": r"model\.layers\.[12]\..*(q|up)_proj"},
    "full-name": {"r": 2, "target_modules": ["model.layers.1.mlp.up_proj"]},
    "all-linear": {"r": 2, "target_modules": "all-linear"},
    "all-linear-excluded": {"r": 2, "target_modules": "all-linear", "exclude_modules": ["o_proj"]},
}


def peft_layers(llama, folder):
    model = PeftModel.from_pretrained(tiny.load_base(llama), folder)
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def assert_same_as_peft(llama, folder, targets):
    pairs, layers = load(folder, targets).pairs, peft_layers(llama, folder)
    assert pairs.keys() == layers.keys()
    for name, (a, b) in pairs.items():
        layer = layers[name]
        assert torch.equal(a, layer.lora_A["default"].weight)
        assert torch.equal(b, layer.lora_B["default"].weight * layer.scaling["default"])


@pytest.mark.parametrize("meaning", MEANINGS)
def test_targets_ranks_and_scaling_are_pefts(meaning, llama, targets, tmp_path):
    config = {"target_modules": EVERY, **MEANINGS[meaning]}
    folder = tiny.make_adapter(tmp_path / "tone", llama, **config)
    assert_same_as_peft(llama, folder, targets)


def test_all_linear_spelled_in_the_file_means_what_peft_makes_of_it(llama, targets, tmp_path):
    folder = tiny.make_adapter(tmp_path / "tone", llama, r=2, target_modules="all-linear")
    change_config(folder, target_modules="all-linear")
    assert_same_as_peft(llama, folder, targets)


def test_all_linear_spelled_in_the_file_leaves_out_excluded_modules(llama, targets, tmp_path):
    config = {"r": 2, "target_modules": "all-linear", "exclude_modules": ["o_proj"]}
    folder = tiny.make_adapter(tmp_path / "tone", llama, **config)
    change_config(folder, target_modules="all-linear")
    assert_same_as_peft(llama, folder, targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_scaling_is_folded_in_before_the_one_cast(stored, dtype, folder, targets):
    change_config(folder, lora_alpha=0.3)
    tensors = {name: tensor.to(stored) for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    save_file(tensors, folder / WEIGHTS_FILE)
    for name, (a, b) in load(folder, targets, dtype=dtype).pairs.items():
        prefix = f"base_model.model.{name}.lora_"
        assert a.dtype == b.dtype == dtype
        assert torch.equal(a, tensors[f"{prefix}A.weight"].to(dtype))
        assert torch.equal(b, (tensors[f"{prefix}B.weight"].float() * (0.3 / 4)).to(dtype))


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": r"(\w+\.?)+!"},
        {"exclude_modules": r"(\w+\.?)+!"},
        {"rank_pattern": {r"(\w+\.?)+!": 2}},
    ],
)
def test_pattern_that_would_never_end_is_refused(change, folder, targets, monkeypatch):
    monkeypatch.setattr("worker.engine.adapters.config._MATCHING_SECONDS", 0.25)
    change_config(folder, **change)
    assert "takes more than 0.25 seconds to match" in refusal(folder, targets)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target_modules": "(" * 1000 + ")" * 1000}, "is not a regular expression"),
        ({"target_modules": "q{99999999999999999999}"}, "is not a regular expression"),
        ({"target_modules": "q" * 5000}, "5000 characters, the limit is 4096"),
        ({"auto_mapping": "A" * (1 << 20)}, "more than 1048576 bytes"),
    ],
)
def test_pattern_that_python_itself_chokes_on_is_refused(change, words, folder, targets):
    change_config(folder, **change)
    assert words in refusal(folder, targets)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_linked_file_is_refused_as_it_may_change_behind_the_version(name, folder, targets, tmp_path):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert f"{name} is a link" in refusal(folder, targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_in_one_piece(dtype, folder, targets):
    """One allocation for each adapter: what it takes is known."""
    weights = load(folder, targets, dtype=dtype)
    tensors = [tensor for pair in weights.pairs.values() for tensor in pair]
    assert all(tensor.is_contiguous() for tensor in tensors)
    (size,) = {tensor.untyped_storage().nbytes() for tensor in tensors}
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert size == weights.num_bytes


def test_tensors_of_many_types_in_one_file_each_mean_what_they_say(folder, targets):
    path = folder / WEIGHTS_FILE
    types = itertools.cycle(
        [torch.bfloat16, torch.float8_e4m3fn, torch.float64, torch.float32, torch.float16]
    )
    tensors = {
        name: tensor.to(dtype) for (name, tensor), dtype in zip(load_file(path).items(), types, strict=False)
    }
    save_file(tensors, path)
    scaling = json.loads((folder / CONFIG_FILE).read_text())["lora_alpha"] / 4
    for name, (a, b) in load(folder, targets).pairs.items():
        prefix = f"base_model.model.{name}.lora_"
        assert torch.equal(a, tensors[f"{prefix}A.weight"].float())
        assert torch.equal(b, tensors[f"{prefix}B.weight"].float() * scaling)


def test_file_of_odd_sizes_in_any_order_of_types_is_read_where_its_tensors_lie(targets, llama, tmp_path):
    """A rank of 3 and halves: what follows them does not begin at a multiple of its own size."""
    folder = tiny.make_adapter(tmp_path / "odd", llama, r=3, target_modules=["q_proj"])
    path = folder / WEIGHTS_FILE
    tensors = load_file(path)
    header, data = {}, b""
    for number, (name, tensor) in enumerate(reversed(tensors.items())):
        own = tensor.to(torch.float8_e5m2) if number % 2 else tensor
        tensors[name] = own
        raw = own.contiguous().view(torch.uint8).numpy().tobytes()
        kind = "F8_E5M2" if number % 2 else "F32"
        header[name] = {
            "dtype": kind,
            "shape": [*own.shape],
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)
    for name, (a, _) in load(folder, targets).pairs.items():
        assert torch.equal(a, tensors[f"base_model.model.{name}.lora_A.weight"].float())


def test_header_is_judged_once_and_the_size_of_every_file(folder, targets, tmp_path, monkeypatch):
    loader = AdapterLoader(targets, max_lora_rank=64, dtype=torch.float32)
    first = loader(KEY, folder)
    monkeypatch.setattr("worker.engine.adapters.loader.safe_open", None)
    again = loader(KEY, folder)
    for name, pair in first.pairs.items():
        assert all(torch.equal(*both) for both in zip(pair, again.pairs[name], strict=True))
    path = folder / WEIGHTS_FILE
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole + b"\0", whole[:-100]):
        path.write_bytes(damaged)
        with pytest.raises(AdapterInvalid, match=f"{WEIGHTS_FILE} has {len(damaged)} bytes") as raised:
            loader(KEY, folder)
        assert raised.value.kind == "file"


@pytest.mark.parametrize("when", ["reading", "scaling", "judging"])
def test_moment_without_memory_says_nothing_about_the_adapter(when, folder, targets, monkeypatch):
    """RuntimeErrors are how torch says so; who remembers which adapters are bad must not remember this."""
    from worker.engine.adapters import loader as loading

    loader = AdapterLoader(targets, max_lora_rank=64, dtype=torch.float32)

    def no_memory(*given, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch:
        if when == "judging":
            patch.setattr(loading, "safe_open", no_memory)
        else:
            patch.setattr(torch, "empty" if when == "reading" else "_foreach_mul_", no_memory)
        with pytest.raises(MemoryError, match="can't allocate"):
            loader(KEY, folder)
    assert loader(KEY, folder).pairs


def test_what_is_remembered_is_bounded_and_what_was_used_last_stays():
    remembered = _Remembered()
    made = []

    def get(number):
        return remembered.get(b"%d" % number, lambda: made.append(number) or number)

    for number in range(200):
        get(number)
        get(0)
    assert made == list(range(200))
    get(199)
    assert len(made) == 200
    get(1)
    assert len(made) == 201
    assert len(remembered._known) <= 64


def test_header_longer_than_any_is_refused_before_it_is_read(folder, targets):
    path = folder / WEIGHTS_FILE
    path.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    assert "a header of 1099511627776 bytes in a file of 10" in refusal(folder, targets)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_folder_in_place_of_a_file_is_refused(name, folder, targets):
    (folder / name).unlink()
    (folder / name).mkdir()
    assert f"{name} cannot be read" in refusal(folder, targets)


def test_file_that_is_replaced_while_its_header_is_judged_says_nothing(folder, targets, monkeypatch):
    path, other = folder / WEIGHTS_FILE, folder / "other"
    shutil.copy(path, other)

    def replaced(*given, **options):
        other.replace(path)
        return safe_open(*given, **options)

    monkeypatch.setattr("worker.engine.adapters.loader.safe_open", replaced)
    with pytest.raises(OSError, match="was replaced while it was read"):
        load(folder, targets)


def test_configuration_is_read_once_for_all_adapters_that_share_it(folder, targets, monkeypatch):
    loader = AdapterLoader(targets, max_lora_rank=64, dtype=torch.float32)
    first = loader(KEY, folder)
    monkeypatch.setattr("worker.engine.adapters.loader.read_config", None)
    again = loader(KEY, folder)
    for name, pair in first.pairs.items():
        assert all(torch.equal(*both) for both in zip(pair, again.pairs[name], strict=True))
    monkeypatch.undo()
    change_config(folder, lora_alpha=1)
    changed = loader(KEY, folder)
    assert not any(torch.equal(pair.b, first.pairs[name].b) for name, pair in changed.pairs.items())


def test_large_finite_weights_are_not_taken_for_infinite(folder, targets):
    """Their sum is."""
    change_tensors(folder, A=lambda a: torch.full_like(a, 3e37))
    assert load(folder, targets).pairs
