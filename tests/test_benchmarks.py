"""The benchmark's own arithmetic, requests and sides, on a tiny model: nothing here is timed."""

import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from tests import tiny
from tests.benchmarks import adapters as adapters_module
from tests.benchmarks import gpu, machine, report, sides, workload
from tests.benchmarks.__main__ import main, parser
from tests.benchmarks.report import BY_NAME, RATIOS, SIDES
from tests.benchmarks.workload import Settings
from tests.engine.harness import Harness
from tests.test_docs import README, section


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    base = tiny.make_base(tmp_path_factory.mktemp("benchmark") / "base")
    return Settings(
        base=base,
        rows=7,
        adapters=3,
        batch=2,
        rank=4,
        prompt_tokens=(3, 20),
        new_tokens=(2, 9),
        max_num_batched_tokens=64,
        max_model_len=120,
        threads=1,
    )


@pytest.fixture(scope="module")
def tokenizer(settings):
    return AutoTokenizer.from_pretrained(settings.base)


@pytest.fixture(scope="module")
def adapters(settings, tmp_path_factory) -> list[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapters_module, "STD", 0.3)  # the tiny model's own weights are as large
        return adapters_module.write_adapters(tmp_path_factory.mktemp("adapters"), settings)


# Requests


def test_requests_are_the_same_every_time_and_other_for_another_seed(settings, tokenizer):
    for make in (workload.mixed, workload.prefixed):
        once, again = (make(tokenizer, settings, 20) for _ in range(2))
        assert workload.digest(once) == workload.digest(again)
        assert workload.digest(once) != workload.digest(make(tokenizer, replace(settings, seed=1), 20))


def test_requests_keep_their_bounds_and_take_the_adapters_in_turn(settings, tokenizer):
    requests = workload.mixed(tokenizer, settings, 300)
    for name, bounds in (("prompt", settings.prompt_tokens), ("new_tokens", settings.new_tokens)):
        lengths = [len(request.prompt) if name == "prompt" else request.new_tokens for request in requests]
        assert (min(lengths), max(lengths)) == bounds
    assert all(request.adapter == request.number % 3 for request in requests)
    numbers = [request.number for request in requests]
    assert sorted(numbers) == list(range(300))
    assert numbers != sorted(numbers)


def test_fewer_rows_are_some_of_the_same_requests(settings, tokenizer):
    assert set(workload.mixed(tokenizer, settings, 5)) < set(workload.mixed(tokenizer, settings, 20))


def test_prefixed_rows_begin_alike_and_warm_up_like_none_of_them(settings, tokenizer):
    requests = workload.prefixed(tokenizer, settings, 20)
    assert len({request.prompt[: workload.PREFIX_TOKENS] for request in requests}) == 1
    assert len({request.prompt[workload.PREFIX_TOKENS :][:3] for request in requests}) > 1
    warm = {request.prompt for request in workload.warm_up(tokenizer, settings)}
    assert len(warm) == settings.batch
    assert not warm & {request.prompt for request in requests + workload.mixed(tokenizer, settings, 20)}


def test_settings_survive_the_command_line_and_json(settings):
    assert Settings.of(sides_options(settings.arguments())) == replace(settings, device="cpu")
    assert Settings.of(json.loads(json.dumps(vars(settings), default=str))) == settings


def sides_options(arguments):
    import argparse

    cli = argparse.ArgumentParser()
    cli.add_argument("--device")
    workload.add_options(cli)
    return cli.parse_args(arguments)


# Adapters and sides


def test_written_adapters_are_what_peft_and_the_engine_read(settings, adapters):
    model = PeftModel.from_pretrained(tiny.load_base(settings.base), adapters[0], adapter_name="adapter0")
    for path in adapters[1:]:
        found = model.load_adapter(path, adapter_name=path.name, low_cpu_mem_usage=True)
        assert not found.unexpected_keys
        assert not [key for key in found.missing_keys if path.name in key]
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert all(layer.lora_B[path.name].weight.abs().max() > 0 for path in adapters)
    assert not torch.equal(layer.lora_A["adapter0"].weight, layer.lora_A["adapter1"].weight)
    harness = Harness(settings.base, max_lora_rank=settings.rank)
    pair = harness.store.weights(harness.adapter(adapters[0])).pairs["model.layers.0.self_attn.q_proj"]
    assert torch.equal(pair.a, layer.lora_A["adapter0"].weight)
    assert torch.allclose(pair.b, layer.lora_B["adapter0"].weight * layer.scaling["adapter0"])


@pytest.mark.parametrize("targets", workload.TARGETS)
def test_adapters_have_the_modules_that_were_asked_for(targets, settings):
    shapes = adapters_module.linear_shapes(settings.base, workload.TARGETS[targets])
    assert len(shapes) == 3 * len(workload.TARGETS[targets])
    assert shapes["model.layers.2.self_attn.q_proj"] == (64, 64)
    with pytest.raises(ValueError, match="has no out_proj"):
        adapters_module.linear_shapes(settings.base, ("q_proj", "out_proj"))


def test_every_side_answers_the_same_requests_with_the_same_tokens(settings, adapters, monkeypatch):
    monkeypatch.setattr(workload, "PREFIX_TOKENS", 30)
    tokens = {}
    for name in sides.KINDS:
        measured = sides.measure(name, "float32", settings, adapters)
        assert measured["generated_tokens"] == sum(map(len, measured["tokens"]))
        assert measured["prefill_seconds"] + measured["decode_seconds"] <= measured["seconds"] * 1.01
        json.dumps(measured)
        tokens[name] = measured["tokens"]
    for name in ("peft-mixed", "peft-switching", "peft-sorted", "peft-merged"):
        assert tokens["ours-mixed"] == tokens[name]
    assert tokens["ours-base"] == tokens["transformers-base"]
    assert tokens["ours-prefix-reused"] == tokens["ours-prefix-repeated"]
    distinct = [tokens[name] for name in ("ours-mixed", "ours-base", "ours-one")]
    assert all(one != other for one, other in ((distinct[0], distinct[1]), (distinct[0], distinct[2])))


def test_a_bf16_peer_keeps_its_adapters_in_one_of_two_types(settings, adapters):
    measured = sides.measure("peft-mixed", "bfloat16", settings, adapters)
    assert measured["details"]["adapters_in"] in {"float32", "bfloat16"}


# The table


def result_of(speeds, *, tokens=None, bf16=False):
    """A result in which each side has these tokens per second, a round for each."""
    rounds = [
        {
            side.key: {
                "rows": 2,
                "tokens_per_second": float(speeds(side)[number]),
                **{f"{name}seconds": 1.0 for name in ("", "prefill_", "decode_", "startup_")},
                "peak_mib": 1000.4,
                "threads": 2,
                "requests": "prefixed" if "prefix" in side.kind else "mixed",
                "details": {"adapters_in": "float32"},
                "tokens": (tokens or (lambda _side: [[1], [2]]))(side),
            }
            for side in SIDES
        }
        for number in range(len(speeds(SIDES[0])))
    ]
    return {
        "options": ["--rounds", str(len(rounds))],
        "machine": {
            "processor": "A processor",
            "cores": 2,
            "native_bf16": bf16,
            "versions": {"torch": "2.0"},
        },
        "settings": json.loads(json.dumps(vars(Settings(base=Path("model"))), default=str)),
        "bf16_rows": 32,
        "rounds": rounds,
    }


def fast(side):
    return (90.0, 100.0, 80.0) if side.kind.startswith("ours") else (10.0, 8.0, 10.0)


def test_a_ratio_is_the_median_over_rounds_of_ratios_within_a_round():
    measured = {one.ratio.name: one for one in report.judge(result_of(fast))}
    assert list(measured) == list(BY_NAME)
    assert measured["peft"].by_round == [9.0, 12.5, 8.0]
    assert measured["peft"].median == 9.0
    assert measured["peft"].cells()[1:5] == ["9.00", "8.00 to 12.50", "6", "yes"]
    assert measured["base"].median == 1.0
    assert measured["prefix"].held is False


def test_a_bound_is_missed_when_one_row_of_fp32_differs_but_not_in_bf16():
    def tokens(side):
        return [[1], [2]] if side.kind.startswith("ours") else [[1], [3]]

    measured = {one.ratio.name: one for one in report.judge(result_of(fast, tokens=tokens))}
    assert (measured["peft"].same, measured["peft"].held) == (1, False)
    assert (measured["base"].same, measured["base"].held) == (None, True)
    assert measured["peft-bf16"].same == 1
    assert not measured["peft-bf16"].ratio.must_match


def test_bf16_over_fp32_is_judged_only_where_the_processor_has_bf16():
    for native, held in ((True, False), (False, None)):
        measured = report.judge(result_of(fast, bf16=native))
        assert [one.held for one in measured if one.ratio.name == "bf16"] == [held]


def test_sides_that_ran_different_requests_are_not_compared():
    result = result_of(fast)
    result["rounds"][1]["peft-mixed/float32"]["requests"] = "others"
    with pytest.raises(ValueError, match="different requests"):
        report.judge(result)


def test_every_ratio_has_its_sides_and_every_side_its_program():
    assert {side for ratio in RATIOS for side in (ratio.ours, ratio.theirs)} == set(SIDES)
    assert {side.kind for side in SIDES} | {*gpu.SIDES} == {*sides.KINDS}
    assert len({side.key for side in SIDES}) == len(SIDES)


def test_the_terminal_and_the_readme_get_the_same_cells():
    result = result_of(fast)
    assert all(" 8.00 to 12.50 " in shown for shown in (report.text(result), report.markdown(result)))
    check_form(report.markdown(result))


def test_the_readme_has_no_figures_or_those_that_the_benchmark_prints():
    if block := section(README.read_text(), "benchmark"):
        check_form(block)


def check_form(block):
    """Raise unless `block` could be the output of `--markdown`."""
    said, _, table = block.partition("\n\n")
    command = re.match(r"`python -m tests\.benchmarks([^`]*)`: median and span of \d+ rounds", said)
    assert command, "the command comes first"
    args = parser().parse_args(shlex.split(command[1]))
    assert re.search(
        r"\d+ cores, \d+ torch threads, bf16 (not )?in\s+hardware, torch \d", " ".join(said.split())
    )
    header, rule, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines())
    assert tuple(header) == report.HEADER
    assert rule == ["---"] * len(header)
    by_title = {ratio.title: ratio for ratio in RATIOS}
    named = [by_title[row[0]].name for row in rows]
    wanted = args.only or [ratio.name for ratio in RATIOS if args.extra or not ratio.extra]
    assert set(named) >= set(wanted)
    assert named == [name for name in BY_NAME if name in named]
    for title, ratio, span, bound, held, *figures, same in rows:
        low, high = map(float, span.split(" to "))
        assert low <= float(ratio) <= high
        assert bound == (f"{by_title[title].at_least:g}" if by_title[title].at_least else "")
        assert held in {"yes", "no", "not judged"}
        assert all(float(figure) > 0 for figure in figures)
        assert re.fullmatch(r"\d+ of \d+", same) if by_title[title].same_text else same == ""


# The command


@pytest.mark.parametrize(
    "arguments",
    [
        "--rows 0",
        "--rounds x",
        "--only nonsense",
        "--targets k",
        "--prompt-tokens 20 10",
        "--prompt-tokens 300 400",
        "--batch 600",
        "--base /nowhere",
        "--draw figure.pdf",
        "--json /nowhere/file.json",
        "--from /nowhere/file.json",
        "--unknown",
    ],
)
def test_arguments_that_make_no_sense_end_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        main(arguments.split())
    assert raised.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"rounds": [], "machine": {}}'])
def test_a_file_that_is_no_result_ends_with_2(content, tmp_path, capsys):
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(SystemExit) as raised:
        main(["--from", str(tmp_path / "result.json")])
    assert raised.value.code == 2
    assert "not a result" in capsys.readouterr().err


def test_a_saved_result_is_shown_and_judged(tmp_path, capsys):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result_of(fast)))
    assert main(["--from", str(path), "--markdown"]) == 1  # reusing the prefix gained nothing in it
    check_form(capsys.readouterr().out.strip())


def test_drawing_without_matplotlib_is_refused_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as raised:
        main(["--draw", "figure.svg"])
    assert raised.value.code == 2
    assert "needs matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_ratios_are_drawn(suffix, tmp_path):
    report.draw(result_of(fast), tmp_path / f"figure.{suffix}")
    assert (tmp_path / f"figure.{suffix}").stat().st_size > 1000


def test_the_table_repeats_the_options_that_were_given(capsys):
    given = ["--rounds", "2", "--only", "peft", "base", "--extra", "--new-tokens", "4", "8"]
    from tests.benchmarks.__main__ import _options

    cli = parser()
    said = _options(cli.parse_args([*given, "--json", "file", "--seed", "0", "--markdown"]), cli)
    assert sorted(said) == sorted(given)


def test_the_processor_is_read_from_what_linux_says():
    arm = "processor\t: 0\nFeatures\t: fp asimd bf16\n"
    intel = "model name\t: A processor\nflags\t\t: fpu avx512f avx512_bf16\n"
    assert machine.processor(intel) == "A processor"
    assert machine.processor(arm) is None
    assert machine.peak_mib() > 10


@pytest.mark.parametrize("known", [True, False])
def test_bf16_counts_as_native_where_the_engine_takes_it_so(known, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": known})
    assert machine.describe()["native_bf16"] is known


# The GPU's arithmetic


def test_an_8b_llama_has_its_weights():
    shape = gpu.LLAMA_8B
    whole = shape.layer_weights + 2 * shape.head_weights
    assert whole == pytest.approx(8.03e9, rel=1e-3)
    assert shape.adapter_weights(16) == pytest.approx(41.9e6, rel=1e-2)


def test_bytes_and_products_of_a_step_are_those_of_a_model_counted_by_hand(settings, adapters):
    config = tiny.load_base(settings.base).config
    shape = gpu.Shape(
        layers=3, hidden=64, intermediate=112, heads=4, kv_heads=2, head_dim=16, vocab=config.vocab_size
    )
    model = tiny.load_base(settings.base)
    linear = sum(module.weight.numel() for module in model.model.modules() if type(module) is torch.nn.Linear)
    assert shape.layer_weights == linear
    stored = (adapters[0] / "adapter_model.safetensors").stat().st_size
    assert shape.adapter_weights(settings.rank) * 4 == pytest.approx(stored, rel=0.2)  # it has a header
    cached = 5 * 10 * 3 * 2 * (2 * 16)  # rows, tokens, layers, keys and values, numbers
    weights = linear + config.vocab_size * 64 + 2 * shape.adapter_weights(4)
    assert shape.decode_bytes(rows=5, length=10, adapters=2, rank=4) == 2 * (weights + cached)
    one = shape.prefill_flops(rows=1, length=1, rank=4)
    assert one == 2 * (linear + shape.adapter_weights(4) + config.vocab_size * 64) + 4 * 64 * 3


def test_a_step_at_the_roofline_has_the_ratio_one():
    used = gpu.settings(Path("base"))
    read = gpu.LLAMA_8B.decode_bytes(rows=64, length=256 + 64, adapters=32, rank=16)
    flops = gpu.LLAMA_8B.prefill_flops(rows=64, length=256, rank=16)
    mixed = {
        "tokens_per_second": 900.0,
        "prefill_seconds": flops / 5e14,
        "details": {"full_decode_step_seconds": read / 2e12},
    }
    measured = {
        "device": "a device",
        "bytes_per_second": 2e12,
        "flops_per_second": 5e14,
        "ours-mixed": mixed,
        "ours-untuned": {"tokens_per_second": 750.0},
        "ours-base": {"tokens_per_second": 1000.0},
        "peft-mixed": {"tokens_per_second": 50.0},
    }
    lines = gpu.table(measured, used)
    assert [line.ratio for line in lines] == pytest.approx([1.0, 1.0, 0.9, 1.2, 18.0])
    assert "2.00 TB/s, 500 TFLOP/s" in gpu.show(measured, lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_its_benchmark_ends_with_2(capsys):
    with pytest.raises(SystemExit) as raised:
        gpu.main([])
    assert raised.value.code == 2
    assert "CUDA" in capsys.readouterr().err
