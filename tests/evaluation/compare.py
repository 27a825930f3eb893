"""One evaluation by lm-evaluation-harness's own back end and one over the queue, and where they differ."""

import io
import itertools
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from tests.e2e.conftest import MODEL, PREFIX, Mill, Process, wait_until
from tests.evaluation.jobs import MAX_ROWS, Jobs
from tests.evaluation.model import QueueLM
from tests.evaluation.tasks import PROMPTS, SENTENCES, TASKS, write

TOLERANCE = 1e-4
"""How far two log-likelihoods may be apart, of a few tokens."""
_OF_MANY = 1e-6
"""And which part of them, of many tokens."""
_START_SECONDS = 300
_SAID_TOKENS = 4
_LONGEST_PROMPT = 110

Answer = float | tuple[float, bool] | str


@dataclass
class Comparison:
    """What the two made of one task."""

    adapter: str
    """"" is the base model."""
    task: str
    documents: int
    ours: list[Answer]
    metrics: dict[str, float]
    worst: float = 0.0
    """The largest difference of two log-likelihoods."""
    problems: list[str] = field(default_factory=list)
    """Every difference that is more than rounding."""

    @property
    def greedy(self) -> int:
        """How many targets are what the model would say."""
        return sum(isinstance(answer, tuple) and answer[1] for answer in self.ours)


class Evaluation(NamedTuple):
    """What the two made of one model."""

    tasks: dict[str, Comparison]
    jobs: int
    theirs_seconds: float
    ours_seconds: float

    @property
    def problems(self) -> list[str]:
        return [problem for task in self.tasks.values() for problem in task.problems]


@contextmanager
def worker(mill: Mill, base: Path, adapters: Mapping[str, Path], **settings: str) -> Iterator[str]:
    """The address of a queue that a `loramill worker` serves; this process too can reach queue and store."""
    for name, path in adapters.items():
        mill.push(path, name)
    queue_url = mill.queue().url
    environ = {
        "LORAMILL_QUEUE_URL": queue_url,
        "LORAMILL_MODEL": str(base),
        "LORAMILL_ADAPTERS_URI": f"{MODEL}adapters/",
        "LORAMILL_DTYPE": "float32",
        **settings,
    }
    own = {name: value for name, value in mill.environ.items() if name.startswith("AWS_")}
    with patch.dict(os.environ, own), mill.worker("--sync", **environ) as process:
        wait_until(partial(_is_ready, process), "the worker", _START_SECONDS)
        yield queue_url


def compare(
    queue_url: str,
    base: Path,
    adapter: tuple[str, Path] | None,
    folder: Path,
    *,
    max_length: int,
    max_rows: int = MAX_ROWS,
    tolerance: float = TOLERANCE,
    chat: bool = False,
) -> Evaluation:
    """Evaluate the base model, or an adapter by name and folder, both ways.

    `folder` is for the tasks, and must not be there yet. No more than `max_rows` are sent in one job.
    """
    name, path = adapter or (None, None)
    reference = HFLM(
        pretrained=str(base),
        peft=None if path is None else str(path),
        dtype="float32",
        device="cpu",
        batch_size=1,
        max_length=max_length,
        # In float32, torch's log_softmax on a CPU is 1e-5 too high for each token of a large vocabulary.
        softmax_dtype="float64",
    )
    write(folder, continuations(reference, [*(text for text, _ in SENTENCES), *PROMPTS]))
    started = time.monotonic()
    theirs = _evaluate(reference, folder, chat)
    between = time.monotonic()
    jobs = Jobs(queue_url, PREFIX, name, max_rows=max_rows)
    ours = _evaluate(QueueLM(jobs, str(base), max_length), folder, chat)
    ended = time.monotonic()
    tasks = {task: _compare(name or "", task, theirs, ours, tolerance) for task in TASKS}
    return Evaluation(tasks, jobs.sent, between - started, ended - between)


def continuations(model: HFLM, prompts: Sequence[str]) -> list[tuple[str, str]]:
    """The short ones of `prompts` with what `model` says next, if as a pair they are cut there."""
    found = []
    for prompt in prompts:
        if not 0 < len(prompt) <= _LONGEST_PROMPT:
            continue
        tokens = model.tok_encode(prompt)
        inputs = model.tokenizer(prompt, return_tensors="pt")
        generated = model.model.generate(**inputs, max_new_tokens=_SAID_TOKENS, do_sample=False)[0].tolist()
        before = model.tok_decode(tokens)
        for end in range(len(generated), len(tokens), -1):
            text = model.tok_decode(generated[:end])[len(before) :]
            if text.strip() and model._encode_pair(prompt, text) == (tokens, generated[len(tokens) : end]):
                found.append((prompt, text))
                break
    return found


def _is_ready(process: Process) -> bool:
    assert process.popen.poll() is None, process.text
    return process.get("/ready")[0] == 200


def _evaluate(model: LM, folder: Path, chat: bool) -> Mapping[str, Any]:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with redirect_stderr(io.StringIO()):  # many progress bars
        found = simple_evaluate(
            model=model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, apply_chat_template=chat
        )
    assert found is not None
    return found


def _compare(
    adapter: str, task: str, theirs: Mapping[str, Any], ours: Mapping[str, Any], tolerance: float
) -> Comparison:
    wanted, answers = _answers(theirs, task), _answers(ours, task)
    assert wanted.keys() == answers.keys()
    found = Comparison(
        adapter,
        task,
        documents=len({document for document, *_ in answers}),
        ours=list(answers.values()),
        metrics=_metrics(ours, task),
    )
    for key, answer in answers.items():
        apart = _apart(answer, wanted[key])
        found.worst = max(found.worst, apart)
        likely = abs(_number(wanted[key]))
        if not apart <= max(tolerance, _OF_MANY * likely) or _rest(answer) != _rest(wanted[key]):
            found.problems.append(f"{adapter} {task} {key}: {answer!r} and not {wanted[key]!r}")
    for name, value in _metrics(theirs, task).items():
        exact = name.startswith(("acc", "exact_match"))
        if not abs(found.metrics[name] - value) <= (0.0 if exact else tolerance * abs(value)):
            found.problems.append(f"{adapter} {task} {name}: {found.metrics[name]} and not {value}")
    return found


def _answers(result: Mapping[str, Any], task: str) -> dict[tuple[int, int], Answer]:
    """By document and place; every filter of a task has the same."""
    return {
        (sample["doc_id"], place): answer
        for sample in result["samples"][task]
        for place, answer in enumerate(itertools.chain(*sample["resps"]))
    }


def _metrics(result: Mapping[str, Any], task: str) -> dict[str, float]:
    return {name: value for name, value in result["results"][task].items() if isinstance(value, float)}


def _number(answer: Answer) -> float:
    """The log-likelihood; of a text it is 0."""
    value = answer[0] if isinstance(answer, tuple) else answer
    return 0.0 if isinstance(value, str) else value


def _rest(answer: Answer) -> str | bool | None:
    """What has to be the same: the text, or whether it is greedy."""
    if isinstance(answer, tuple):
        return answer[1]
    return answer if isinstance(answer, str) else None


def _apart(one: Answer, other: Answer) -> float:
    return abs(_number(one) - _number(other))
