"""A mixed batch of 16 rows and 8 adapters on the demo model: this engine beside PEFT, in one run.

    python -m tests.benchmarks.mixed_batch [--rows 16] [--adapters 8] [--rounds 3]

Each side runs in a process of its own, turn by turn, so that start-up and peak memory are its own and a
machine that slows down slows both. Both decode greedily in fp32 on the CPU; the rows whose tokens are
identical are counted. The ratio is of generated tokens per second, ours over PEFT's, round by round.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


def workload(args: argparse.Namespace, tokenizer: Any) -> list[tuple[list[int], int]]:
    """Rows of (prompt tokens, adapter number); lengths and adapters are mixed."""
    rng = random.Random(0)
    words = ["the", "old", "captain", "told", "stories", "about", "storms", "gold", "ships", "and", "home"]
    rows = []
    for number in range(args.rows):
        text = "Tell me " + " ".join(rng.choice(words) for _ in range(rng.randint(4, 60)))
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        rows.append((tokenizer(chat, add_special_tokens=False).input_ids, number % args.adapters))
    rng.shuffle(rows)
    return rows


def make_adapters(base: Path, folder: Path, count: int) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **LORA)
    )
    for number in range(count):
        torch.manual_seed(number)
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                if "lora_" in name:
                    tensor.normal_(0.0, 0.02)
        model.save_pretrained(folder / f"adapter{number}")


def run_ours(args: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    from transformers import AutoTokenizer

    from tests.engine.harness import Harness
    from worker.jobs import InferenceRequest, SamplingParams

    harness = Harness(
        args.base,
        max_num_seqs=args.rows,
        max_num_batched_tokens=2048,
        max_loras=args.adapters,
        max_model_len=1024,
    )
    keys = [harness.adapter(args.folder / f"adapter{number}") for number in range(args.adapters)]
    ready = time.perf_counter()
    params = SamplingParams(max_new_tokens=args.max_new_tokens, ignore_eos=True)
    rows = workload(args, AutoTokenizer.from_pretrained(args.base))
    requests = [
        InferenceRequest(id=str(i), prompt=tuple(prompt), adapter=keys[adapter], params=params)
        for i, (prompt, adapter) in enumerate(rows)
    ]
    harness.run(requests[:1])  # both sides are timed warm
    begun = time.perf_counter()
    done = harness.run(requests)
    seconds = time.perf_counter() - begun
    return _result(started, ready, seconds, [list(done[str(i)].token_ids) for i in range(len(rows))])


def run_peft(args: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base: Any = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, args.folder / "adapter0", adapter_name="adapter0")
    for number in range(1, args.adapters):
        model.load_adapter(args.folder / f"adapter{number}", adapter_name=f"adapter{number}")
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    ready = time.perf_counter()
    rows = workload(args, tokenizer)
    longest = max(len(prompt) for prompt, _ in rows)
    pad = [longest - len(prompt) for prompt, _ in rows]
    ids = torch.tensor([[0] * gap + prompt for gap, (prompt, _) in zip(pad, rows, strict=True)])
    mask = torch.tensor([[0] * gap + [1] * (longest - gap) for gap in pad])
    names = [f"adapter{adapter}" for _, adapter in rows]
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.inference_mode():
        model.generate(
            input_ids=ids[:1], attention_mask=mask[:1], adapter_names=names[:1], max_new_tokens=2, **options
        )
        begun = time.perf_counter()
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            adapter_names=names,
            max_new_tokens=args.max_new_tokens,
            **options,
        )
    seconds = time.perf_counter() - begun
    return _result(started, ready, seconds, output[:, longest:].tolist())


def _result(started: float, ready: float, seconds: float, tokens: list[list[int]]) -> dict[str, Any]:
    return {
        "startup_seconds": ready - started,
        "tokens_per_second": sum(map(len, tokens)) / seconds,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "tokens": tokens,
    }


def _spawn(side: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.mixed_batch", "--side", side]
    for name in ("rows", "adapters", "max_new_tokens", "base", "folder"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(args: argparse.Namespace) -> None:
    rounds = []
    for number in range(args.rounds):
        rounds.append((_spawn("ours", args), _spawn("peft", args)))
        ours, peft = rounds[-1]
        print(f"round {number + 1}: {ours['tokens_per_second'] / peft['tokens_per_second']:.2f}x", flush=True)
    size = f"{args.rows} rows, {args.adapters} adapters of rank {LORA['r']}, {args.max_new_tokens} new tokens"
    print(f"\n{size}, fp32")
    print(f"{'median':<34}{'loramill':>10}{'PEFT':>10}{'ratio':>8}")
    for name, title in (
        ("tokens_per_second", "generated tokens/s"),
        ("startup_seconds", "start-up seconds, adapters loaded"),
        ("peak_mib", "peak memory, MiB"),
    ):
        ours, peft = (statistics.median(pair[side][name] for pair in rounds) for side in (0, 1))
        ratio = statistics.median(pair[0][name] / pair[1][name] for pair in rounds)
        print(f"{title:<34}{ours:>10.1f}{peft:>10.1f}{ratio:>8.2f}")
    same = sum(a == b for a, b in zip(rounds[0][0]["tokens"], rounds[0][1]["tokens"], strict=True))
    print(f"rows with identical tokens: {same} of {args.rows}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--base", type=Path, help="folder of a base model; default: the demo's")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=["ours", "peft"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side is not None:
        print(json.dumps(run_ours(args) if args.side == "ours" else run_peft(args)))
        return
    if args.base is None:
        from worker.demo.base_model import prepare_base_model

        args.base = prepare_base_model(Path.home() / ".cache" / "loramill", print)
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        make_adapters(args.base, args.folder, args.adapters)
        compare(args)


if __name__ == "__main__":
    main()
