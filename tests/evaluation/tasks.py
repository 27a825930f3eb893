"""Tasks of lm-evaluation-harness on data of our own, in its own format."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TASKS = ("choices", "words", "texts", "answers")

LICENSE = (Path(__file__).parents[2] / "LICENSE").read_text()
QUESTIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("What do bees make?", "honey", ("rope", "glass", "tin cans")),
    ("What is the capital of France?", "Paris", ("Rome", "Oslo", "a cheese")),
    ("What is the capital of Norway?", "Oslo", ("Madrid", "Paris", "Lima")),
    ("Which animal barks?", "the dog", ("the cat", "the cow", "the trout")),
    ("What falls from clouds?", "rain", ("sand", "wool", "copper coins")),
    ("How many legs has a spider?", "eight", ("six", "four", "two")),
    ("What is frozen water called?", "ice", ("steam", "salt", "sugar")),
    ("What colour is grass?", "green", ("red", "blue", "violet")),
    ("What do we breathe?", "air", ("soup", "gravel", "ink")),
    ("Which is the largest ocean?", "the Pacific", ("the Baltic", "the Atlantic", "Lake Geneva")),
    ("What comes after Monday?", "Tuesday", ("Sunday", "Friday", "January")),
    ("What is two plus three?", "five", ("four", "seven", "thirty-two")),
    ("What do cows drink?", "water", ("milk", "petrol", "tea with lemon")),
    ("Who wrote Hamlet?", "Shakespeare", ("Goethe", "Cervantes", "Napoléon")),
    ("Wo fließt die Elbe ins Meer?", "bei Cuxhaven", ("bei Köln", "in Zürich", "in Łódź")),
    ("水は何からできていますか?", "水素と酸素", ("金", "砂糖と塩", "🪵")),
)
SENTENCES: tuple[tuple[str, str], ...] = (
    ("The sun rises in the", " east"),
    ("Once upon a", " time"),
    ("The opposite of hot is", " cold"),
    ("One, two, three, four,", " five"),
    ("A dog is a man's best", " friend"),
    ("Twinkle, twinkle, little", " star"),
    ("She opened the door and went ", "inside"),
    ("The quick brown fox jumps over the lazy", " dog"),
    ("The cat sat on the\n", "mat"),
    ("", "Hello"),
    ("", " there"),
    ("<s>It is", " late"),
    ("It was said before: " * 40 + "it was", " said before"),
)
SPEECH = (
    "The harbour was quiet before dawn. Nets hung from the rails, gulls slept on one leg, the tide turned.",
    "Überall lag Schnee, und wo kein Schnee lag, da lag Eis; niemand sagte etwas.",
    "x",
    "🦊🦊 → 狐",
    LICENSE[:3000],
)
_SHOTS = "Q: The opposite of up?\nA: down\n\nQ: 1 + 1?\nA: 2\n\n"
PROMPTS = tuple(f"{_SHOTS}Q: {question}\nA:" for question, _, _ in QUESTIONS)
"""That ask for an answer."""
_WHOLE, _FIRST = r"^\s*(.*?)\s*$", r"^\s*(\S)"


def write(folder: Path, said: Sequence[tuple[str, str]]) -> Path:
    """Write all tasks into `folder`, among the targets by which the model goes on after a text: `said`."""
    folder.mkdir(parents=True)
    _write(
        folder,
        "choices",
        [_choice(place % 4, *question) for place, question in enumerate(QUESTIONS)],
        output_type="multiple_choice",
        doc_to_text="{{text}}\nA:",
        doc_to_choice="choices",
        doc_to_target="answer",
        metrics=["acc", "acc_norm", "acc_mutual_info"],
    )
    _write(
        folder,
        "words",
        [{"text": text, "target": target} for text, target in (*SENTENCES, *said)],
        output_type="loglikelihood",
        doc_to_text="{{text}}",
        doc_to_target="{{target}}",
        target_delimiter="",
        metrics=["perplexity", "acc"],
    )
    _write(
        folder,
        "texts",
        [{"text": text} for text in SPEECH],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metrics=["word_perplexity", "byte_perplexity", "bits_per_byte"],
    )
    prompts = list(zip(PROMPTS, (answer for _, answer, _ in QUESTIONS), strict=True))
    prompts += [(text, after.strip()[:1]) for text, after in said if text in PROMPTS]
    prompts.append((LICENSE[:2000], "yes"))
    _write(
        folder,
        "answers",
        [{"text": text, "target": target} for text, target in prompts],
        output_type="generate_until",
        doc_to_text="{{text}}",
        doc_to_target="{{target}}",
        generation_kwargs={"until": ["\n", ".", "Q:"], "max_gen_toks": 24},
        filter_list=[_filter("whole", _WHOLE), _filter("first", _FIRST)],
        metrics=["exact_match"],
    )
    return folder


def _choice(place: int, question: str, right: str, wrong: Sequence[str]) -> dict[str, Any]:
    return {"text": f"Q: {question}", "choices": [*wrong[:place], right, *wrong[place:]], "answer": place}


def _filter(name: str, pattern: str) -> dict[str, Any]:
    regex = {"function": "regex", "regex_pattern": pattern, "fallback": ""}
    return {"name": name, "filter": [regex, {"function": "take_first"}]}


def _write(
    folder: Path, name: str, docs: Sequence[Mapping[str, Any]], *, metrics: Sequence[str], **fields: Any
) -> None:
    """A task's data, and its YAML, for which JSON will do."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        **fields,
        "metric_list": [{"metric": metric} for metric in metrics],
        "metadata": {"version": 1},
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task))
