"""The requests: a function of the settings alone, so that every side makes the same token ids for itself."""

import argparse
import hashlib
import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

TARGETS = {
    "qv": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
PREFIX_TOKENS = 200
PREFIX_ADAPTERS = 4
PREFIX_NEW_TOKENS = (8, 32)
"""A job with a long instruction and short answers: the kind that sharing a prefix is for."""
_WARM_NEW_TOKENS = 8
_VOCABULARY = """
a about after all an and answer are as at be because before between book but by called can city could day
did do does down each early every far few find first for found from garden give good great had hand has have
he her here high his home house how if in into is it its just keep kind know land large last late learn left
letter life light like line little long look made make man many may mean might more most mother mountain
move much must name near never new next night no not now of off often old on once one only open or other our
out over paper part people place play point question rain read right river said same saw school sea second
see sentence set she ship should show small so some sound still stood stop story study such summer take talk
tell than that the their them then there these they thing think this those thought three through time to
together too took town tree turn two under until up us use very walk want was watch water way we well went
were what when where which while white who why wind winter with without word work world would write year you
young your
"""
_WORDS = tuple(_VOCABULARY.split())


class Request(NamedTuple):
    number: int
    """Its place in the order in which it was made; the arrival order is another."""
    prompt: tuple[int, ...]
    new_tokens: int
    adapter: int


@dataclass(frozen=True)
class Settings:
    """What is measured; the same for all sides of a run."""

    base: Path
    rows: int = 64
    adapters: int = 32
    batch: int = 16
    """Rows in one batch: of `generate`, and `max_num_seqs` and `max_loras` of ours."""
    rank: int = 8
    targets: str = "all"
    prompt_tokens: tuple[int, int] = (16, 128)
    new_tokens: tuple[int, int] = (16, 192)
    max_num_batched_tokens: int = 512
    max_model_len: int = 512
    seed: int = 0
    threads: int | None = None
    """None leaves it to torch."""
    device: str = "cpu"

    def arguments(self) -> list[str]:
        """Command line options that say the same."""
        options: list[str] = []
        for name, value in asdict(self).items():
            if value is not None:
                values = value if isinstance(value, tuple) else (value,)
                options += [f"--{name.replace('_', '-')}", *map(str, values)]
        return options

    @classmethod
    def of(cls, given: argparse.Namespace | dict[str, Any]) -> "Settings":
        """From parsed options, or from what `asdict` and JSON made of another; the rest is ignored."""
        values = given if isinstance(given, dict) else vars(given)
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        for name in ("prompt_tokens", "new_tokens"):
            known[name] = tuple(known[name])
        return cls(**known | {"base": Path(known["base"])})

    def check(self) -> None:
        """Raise ValueError for lengths that cannot be."""
        for name in ("prompt_tokens", "new_tokens"):
            shortest, longest = getattr(self, name)
            if not 1 <= shortest <= longest:
                raise ValueError(
                    f"--{name.replace('_', '-')} {shortest} {longest}: 1 <= LOW <= HIGH is needed"
                )
        answers = max(self.new_tokens[1], PREFIX_NEW_TOKENS[1])
        longest = max(
            self.prompt_tokens[1] + answers, PREFIX_TOKENS + self.prompt_tokens[1] + PREFIX_NEW_TOKENS[1]
        )
        if longest > self.max_model_len:
            raise ValueError(f"rows of {longest} tokens do not fit in --max-model-len {self.max_model_len}")
        if self.batch > self.max_num_batched_tokens:
            limit = f"--max-num-batched-tokens {self.max_num_batched_tokens}"
            raise ValueError(f"--batch {self.batch} does not fit in {limit}: a row needs a token")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options behind `Settings`; `--base` is left None for the demo's model."""
    defaults = Settings(base=Path())

    def number(name: str, text: str) -> None:
        default = getattr(defaults, name.replace("-", "_"))
        parser.add_argument(
            f"--{name}", type=positive, default=default, metavar="N", help=f"{text} (default {default})"
        )

    parser.add_argument("--base", type=folder, metavar="FOLDER", help="base model (default: the demo's)")
    number("rows", "rows of the job")
    number("adapters", "different adapters in it")
    number("batch", "rows in a batch, on all sides")
    number("rank", "rank of the adapters")
    parser.add_argument(
        "--targets",
        choices=TARGETS,
        default=defaults.targets,
        help="modules with LoRA (default all linear ones)",
    )
    for name in ("prompt-tokens", "new-tokens"):
        low, high = getattr(defaults, name.replace("-", "_"))
        parser.add_argument(
            f"--{name}",
            type=int,
            nargs=2,
            default=(low, high),
            metavar=("LOW", "HIGH"),
            help=f"log-uniform between the two (default {low} {high})",
        )
    number("max-num-batched-tokens", "tokens in one step of our engine")
    number("max-model-len", "tokens of prompt and answer together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=positive, metavar="N", help="threads of torch (default: its own)")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def folder(text: str) -> Path:
    if not (Path(text) / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{text} is not the folder of a model: it has no config.json")
    return Path(text).resolve()


def demo_base_model(on_progress: Callable[[str], None]) -> Path:
    from worker.demo.base_model import prepare_base_model

    return prepare_base_model(Path.home() / ".cache" / "loramill", on_progress)


def mixed(tokenizer: Any, settings: Settings, rows: int) -> list[Request]:
    """The job, in arrival order. Fewer `rows` are some of the same requests."""
    requests = []
    for number in range(rows):
        rng = random.Random(f"{settings.seed}/{number}")
        prompt = _tokens(tokenizer, rng, _length(rng, settings.prompt_tokens))
        new_tokens = _length(rng, settings.new_tokens)
        requests.append(Request(number, prompt, new_tokens, number % settings.adapters))
    random.Random(settings.seed).shuffle(requests)
    return requests


def prefixed(tokenizer: Any, settings: Settings, rows: int) -> list[Request]:
    """The same prompts behind one long instruction, few adapters and short answers."""
    prefix = _tokens(tokenizer, random.Random(f"{settings.seed}/prefix"), PREFIX_TOKENS)
    adapters = min(PREFIX_ADAPTERS, settings.adapters)
    return [
        Request(
            number,
            prefix + prompt,
            _length(random.Random(f"{settings.seed}/{number}/answer"), PREFIX_NEW_TOKENS),
            number % adapters,
        )
        for number, prompt, _, _ in mixed(tokenizer, settings, rows)
    ]


def warm_up(tokenizer: Any, settings: Settings) -> list[Request]:
    """One batch of other prompts, about as short as the shortest, and a few tokens each."""
    return [
        Request(
            number,
            _tokens(
                tokenizer,
                random.Random(f"{settings.seed}/warm/{number}"),
                settings.prompt_tokens[0] + number % 16,
            ),
            _WARM_NEW_TOKENS,
            number % settings.adapters,
        )
        for number in range(settings.batch)
    ]


def digest(requests: list[Request]) -> str:
    return hashlib.sha256(json.dumps(requests).encode()).hexdigest()[:16]


def _length(rng: random.Random, bounds: tuple[int, int]) -> int:
    low, high = bounds
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))


def _tokens(tokenizer: Any, rng: random.Random, count: int) -> tuple[int, ...]:
    """Exactly `count` tokens of sentences that could be words of somebody."""
    sentences = (
        " ".join(rng.choice(_WORDS) for _ in range(rng.randint(6, 14))).capitalize()
        for _ in range(count // 6 + 1)  # a word is a token or more
    )
    ids = tokenizer(". ".join(sentences), add_special_tokens=False).input_ids
    assert len(ids) >= count
    return tuple(ids[:count])
