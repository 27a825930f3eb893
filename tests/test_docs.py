"""The README says what the code does: its tables are made from it, and its examples are run.

`python -m tests.test_docs` writes the tables anew.
"""

import json
import re
import shlex
from pathlib import Path

import msgspec
import pytest
import typer
from prometheus_client import CollectorRegistry

from adapters_sync.metrics import SyncMetrics
from adapters_sync.settings import describe
from worker import wire
from worker.cli import app
from worker.errors import SettingsError
from worker.jobs import Delivery, Given, SamplingParams, Task
from worker.metrics import Metrics
from worker.settings import Settings, read_settings
from worker.wire.lines import read_line
from worker.wire.openai_rows import CHAT_NAMES, COMPLETION_NAMES
from worker.wire.parameters import NAMES as PARAMETERS
from worker.wire.results import ResultLine, ScoreLine

README = Path(__file__).parent.parent / "README.md"


def settings_table() -> str:
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for info in describe(Settings):
        default = (
            ""
            if info.default in {None, ()}
            else f"`{str(info.default).lower() if info.kind is bool else info.default}`"
        )
        option = f" Option `{info.option}`." if info.option else ""
        values = f" One of {', '.join(f'`{value}`' for value in info.allowed)}." if info.allowed else ""
        lines.append(f"| `{info.env}` `{info.flag}` | {default} | {info.help}{values}{option} |")
    return "\n".join(lines)


def metrics_table() -> str:
    lines = ["| metric | type | meaning |", "|---|---|---|"]
    registry = CollectorRegistry()
    Metrics(registry)
    SyncMetrics(registry)
    for family in registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        lines.append(f"| `{name}` | {family.type} | {family.documentation} |")
    return "\n".join(lines)


def commands_table() -> str:
    lines = []
    for name, command in typer.main.get_command(app).commands.items():
        lines.append(f"| `loramill {name}` | {(command.help or '').splitlines()[0]} |")
    return "\n".join(lines)


TABLES = {"settings": settings_table, "metrics": metrics_table, "commands": commands_table}


def section(text: str, name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
    assert found, f"the README has no <!-- {name} --> section"
    return found[1].strip()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("name", TABLES)
def test_table_is_what_the_code_says(name: str) -> None:
    expected = TABLES[name]()
    assert section(README.read_text(), name) == expected, "run: python -m tests.test_docs"


def test_the_message_is_one_that_the_worker_takes() -> None:
    body = blocks("json")[0]
    delivery = Delivery(message_id="m", body=body, receipt="r")
    job = wire.decode(delivery, output_prefixes=["s3://bucket/results/"], max_rows=10, now=0.0)
    assert [row.adapter for row in job.rows] == ["pirate", "robot"]
    assert not any(row.failure for row in job.rows)
    assert wire.result_uri(job) in README.read_text()


def test_the_line_has_the_fields_of_a_result_line() -> None:
    line = json.loads(blocks("json")[1])
    encoded = json.dumps(line).encode() + b"\n"
    assert wire.tally(encoded).completed == 1
    always = [
        field.name for field in msgspec.structs.fields(ResultLine) if field.default is msgspec.NODEFAULT
    ]
    assert list(line) == always


def test_the_job_by_reference_is_one_that_the_worker_takes() -> None:
    delivery = Delivery(message_id="m", body=blocks("json")[2], receipt="r")
    job = wire.decode(delivery, output_prefixes=["s3://bucket/results/"], max_rows=10, now=0.0)
    assert job.source is not None
    assert job.source.is_packed
    assert job.given.adapter == "pirate"


def test_the_job_of_scores_is_one_that_the_worker_takes_and_its_line_has_the_fields_of_one() -> None:
    delivery = Delivery(message_id="m", body=blocks("json")[3], receipt="r")
    job = wire.decode(delivery, output_prefixes=["s3://bucket/results/"], max_rows=10, now=0.0)
    assert [(row.task, row.target, row.failure) for row in job.rows] == [
        (Task.SCORE, " honey", None),
        (Task.SCORE, " rope", None),
        (Task.SCORE, None, None),
    ]
    line = json.loads(blocks("json")[4])
    assert wire.tally(json.dumps(line).encode() + b"\n").completed == 1
    assert list(line) == [name for name in ScoreLine.__struct_fields__ if name != "details"]


@pytest.mark.parametrize(("block", "shape"), [(5, "chat"), (6, "llama")])
def test_lines_of_other_formats_are_read(block: int, shape: str) -> None:
    row = read_line(blocks("json")[block].strip().encode(), 0, Given(base_models=frozenset()))
    assert (row.failure, row.adapter, row.params.max_new_tokens) == (None, "pirate", 40)
    assert row.origin is not None
    assert row.origin.shape == shape


def test_parameters_of_openai_are_named() -> None:
    text = README.read_text()
    names = (CHAT_NAMES | COMPLETION_NAMES) - {
        "model",
        "messages",
        "prompt",
        "best_of",
        "suffix",
        "stream_options",
    }
    assert not [name for name in names if f"`{name}`" not in text]


def test_parameters_table_names_every_parameter_and_default() -> None:
    text = README.read_text()
    rows = dict(re.findall(r"^\| (`[a-z_`, ]+`) \| ([^|]*) \|", text, re.MULTILINE))
    named = {name for cell in rows for name in re.findall(r"`([a-z_]+)`", cell)}
    assert named >= PARAMETERS
    assert rows["`max_new_tokens`"] == str(SamplingParams().max_new_tokens)


def test_commands_in_the_readme_are_commands() -> None:
    commands = typer.main.get_command(app).commands
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    ours = [shlex.split(line, comments=True) for line in lines if line.startswith("loramill")]
    assert len(ours) >= 3
    for _, name, *arguments in ours:
        context = commands[name].make_context(name, arguments, resilient_parsing=False)
        assert context.params


def test_worker_example_has_valid_settings() -> None:
    line = next(b for b in blocks("sh") if b.startswith("loramill worker")).replace("\\\n", " ")
    context = typer.main.get_command(app).commands["worker"].make_context("worker", shlex.split(line)[2:])
    flags = {k: v for k, v in context.params.items() if k != "debug"}
    settings = read_settings(environ={}, flags=flags)
    assert settings.sync
    assert not settings.require("model", "queue_url", "output_prefixes")
    with pytest.raises(SettingsError):
        read_settings(environ={}, flags=flags | {"queue_url": "nonsense"})


def write() -> None:
    text = README.read_text()
    for name, table in TABLES.items():
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda found, table=table: found[1] + table() + "\n" + found[2],
            text,
            flags=re.DOTALL,
        )
    README.write_text(text)


if __name__ == "__main__":
    write()
