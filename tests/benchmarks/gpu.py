"""On a CUDA device: random weights in the shape of an 8B Llama, bf16, against what the device can do.

    python -m tests.benchmarks.gpu [--json FILE]

The rooflines are measured on the same device in the same run: bytes a second of a device copy, products a
second of a large bf16 matrix product. 64 rows of 256 tokens get 128 each, in one batch, with 32 adapters of
rank 16 on all seven linear modules, with kernels fitted to the device and as they come, and again without
adapters. Exit status: 0 when every bound held, 1 when one did not or a side failed, 2 when there is no CUDA
device.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks.adapters import write_adapters
from tests.benchmarks.sides import SideFailed, measure_apart, quiet
from tests.benchmarks.workload import Settings, demo_base_model

_BF16_BYTES = 2
_DTYPE = "bfloat16"
_COPY_BYTES = 2 << 30
_MATRIX = 8192
_REPEATS = 20
SIDES = ("ours-mixed", "ours-untuned", "ours-base", "peft-mixed")


class Shape(NamedTuple):
    """A Llama, and what one step of it has to read and to multiply at the least."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def linear(self) -> list[tuple[int, int]]:
        """(in, out) of one layer's seven linear modules."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [(self.hidden, queries), (self.hidden, keys), (self.hidden, keys), (queries, self.hidden)]
        inner = self.intermediate
        return [*attention, (self.hidden, inner), (self.hidden, inner), (inner, self.hidden)]

    @property
    def layer_weights(self) -> int:
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linear)

    @property
    def head_weights(self) -> int:
        return self.vocab * self.hidden

    def adapter_weights(self, rank: int) -> int:
        return self.layers * sum(rank * (inputs + outputs) for inputs, outputs in self.linear)

    def decode_bytes(self, *, rows: int, length: int, adapters: int, rank: int) -> int:
        """Read once a step: every weight but the embeddings, `length` cached tokens of each row, A and B."""
        cached = self.layers * 2 * self.kv_heads * self.head_dim * rows * length
        weights = self.layer_weights + self.head_weights + adapters * self.adapter_weights(rank)
        return _BF16_BYTES * (weights + cached)

    def prefill_flops(self, *, rows: int, length: int, rank: int) -> int:
        """Of `rows` prompts: all products, causal attention, LoRA, and the head for the last tokens."""
        linear = 2 * rows * length * (self.layer_weights + self.adapter_weights(rank))
        pairs = length * (length + 1) // 2
        attention = 4 * rows * pairs * self.heads * self.head_dim * self.layers
        return linear + attention + 2 * rows * self.head_weights


LLAMA_8B = Shape(layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128, vocab=128256)


class Line(NamedTuple):
    title: str
    ratio: float
    at_least: float | None


def settings(base: Path) -> Settings:
    return Settings(
        base=base,
        rows=64,
        adapters=32,
        batch=64,
        rank=16,
        prompt_tokens=(256, 256),
        new_tokens=(128, 128),
        max_num_batched_tokens=4096,
        device="cuda",
    )


def table(measured: dict[str, Any], used: Settings, shape: Shape = LLAMA_8B) -> list[Line]:
    """Ratios of a run: `measured` has the sides by name and the two rooflines."""
    mixed, untuned, base, peft = (measured[name] for name in SIDES)
    prompt, answer = used.prompt_tokens[0], used.new_tokens[0]
    read = shape.decode_bytes(
        rows=used.batch, length=prompt + answer // 2, adapters=used.adapters, rank=used.rank
    )
    flops = shape.prefill_flops(rows=used.rows, length=prompt, rank=used.rank)
    step = mixed["details"]["full_decode_step_seconds"]
    return [
        Line("decode, of the memory roofline", read / measured["bytes_per_second"] / step, 0.6),
        Line(
            "prefill, of the matrix roofline",
            flops / measured["flops_per_second"] / mixed["prefill_seconds"],
            None,
        ),
        Line("32 adapters, of our own base", mixed["tokens_per_second"] / base["tokens_per_second"], 0.9),
        Line(
            "32 adapters, over kernels as they come",
            mixed["tokens_per_second"] / untuned["tokens_per_second"],
            None,
        ),
        Line("32 adapters, over PEFT's", mixed["tokens_per_second"] / peft["tokens_per_second"], 15),
    ]


def measure_rooflines() -> dict[str, float]:
    import torch

    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copying = _fastest(lambda: target.copy_(source))
    factor = torch.randn(_MATRIX, _MATRIX, dtype=torch.bfloat16, device="cuda")
    multiplying = _fastest(lambda: factor @ factor)
    return {"bytes_per_second": 2 * _COPY_BYTES / copying, "flops_per_second": 2 * _MATRIX**3 / multiplying}


def _fastest(work: Any) -> float:
    """Seconds of the fastest of some repeats."""
    import torch

    seconds = []
    for _ in range(_REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000)
    return min(seconds)


def make_base(folder: Path, shape: Shape) -> None:
    """A model of this shape with random weights, and the demo's tokenizer, whose ids are all below its."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    config = LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    AutoTokenizer.from_pretrained(demo_base_model(_say)).save_pretrained(folder)


def run(folder: Path) -> dict[str, Any]:
    import torch

    measured: dict[str, Any] = {"device": torch.cuda.get_device_name(), **measure_rooflines()}
    torch.cuda.empty_cache()
    _say("making a base model of 16 GB and its adapters")
    base, adapters = folder / "base", folder / "adapters"
    adapters.mkdir()
    make_base(base, LLAMA_8B)
    used = settings(base)
    write_adapters(adapters, used)
    for name in SIDES:
        measured[name] = measure_apart(name, _DTYPE, used, adapters)
        _say(f"{name}: {measured[name]['tokens_per_second']:.1f} tokens/s")
    return measured


def show(measured: dict[str, Any], lines: list[Line]) -> str:
    roof = (
        f"{measured['bytes_per_second'] / 1e12:.2f} TB/s, {measured['flops_per_second'] / 1e12:.0f} TFLOP/s"
    )
    rows = [f"{measured['device']}: {roof}", f"{'':<40}{'ratio':>8}{'at least':>10}{'held':>6}"]
    for title, ratio, at_least in lines:
        bound, held = (
            ("", "") if at_least is None else (f"{at_least:g}", "yes" if ratio >= at_least else "no")
        )
        rows.append(f"{title:<40}{ratio:>8.2f}{bound:>10}{held:>6}")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    cli = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cli.add_argument("--json", type=Path, metavar="FILE", help="keep the results")
    args = cli.parse_args(argv)
    if args.json and not args.json.absolute().parent.is_dir():
        cli.error(f"--json {args.json}: there is no folder {args.json.absolute().parent}")
    quiet()
    import torch

    if not torch.cuda.is_available():
        cli.error("this benchmark needs a CUDA device, and torch finds none")
    try:
        with tempfile.TemporaryDirectory(prefix="loramill-benchmark-") as folder:
            measured = run(Path(folder))
    except SideFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    lines = table(measured, settings(Path("base")))
    print(show(measured, lines))
    if args.json:
        args.json.write_text(json.dumps(measured) + "\n")
    return 1 if any(line.at_least is not None and line.ratio < line.at_least for line in lines) else 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
