"""`loramill run-batch` with its engine, where no AWS is: no settings of it, and whoever asks for it fails."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import tiny
from tests.e2e.conftest import PREFIX, wait_until

NO_AWS = """
import socket, sys
import aioboto3, botocore.session

def refuse(*arguments, **options):
    raise AssertionError(f"somebody asked for AWS, or for the network: {arguments}")

aioboto3.Session.client = botocore.session.Session.create_client = refuse
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
from worker.cli import main
sys.argv[0] = "loramill"
main()
"""
PATIENCE_SECONDS = 240
TOKENS = {"max_new_tokens": 24, "ignore_eos": True}


class Here:
    """A folder with a base model and adapters, in which the command runs."""

    def __init__(self, folder: Path, base: Path, adapters: Path) -> None:
        self.folder = folder
        self._model = ["--model", str(base), "--adapters", str(adapters), "--device", "cpu"]
        left_out = ("AWS_", "LORAMILL_", "OPTION_")
        self._environ = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}

    def start(self, *arguments: str, **options) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", NO_AWS, "run-batch", *self._model, *arguments]
        pipes = {"stdin": subprocess.DEVNULL} | dict.fromkeys(("stdout", "stderr"), subprocess.PIPE) | options
        return subprocess.Popen(command, cwd=self.folder, env=self._environ, text=True, **pipes)

    def run(self, *arguments: str, code: int = 0, **options) -> str:
        """The command to its end; what it said."""
        with self.start(*arguments, **options) as process:
            out, err = process.communicate(timeout=PATIENCE_SECONDS)
        assert (process.returncode, out) == (code, ""), err
        return err

    def write(self, name: str, rows: list) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (self.folder / name).write_bytes(
            gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
        )

    def lines(self, name: str) -> list[dict]:
        data = (self.folder / name).read_bytes()
        return [
            json.loads(line)
            for line in (gzip.decompress(data) if name.endswith(".gz") else data).splitlines()
        ]

    def manifest(self, name: str) -> dict:
        return json.loads((self.folder / f"{name}.manifest.json").read_bytes())


@pytest.fixture(scope="module")
def adapters(adapter_paths, tmp_path_factory) -> Path:
    """A plain folder of adapters."""
    folder = tmp_path_factory.mktemp("run-batch") / "adapters"
    for name, path in adapter_paths.items():
        shutil.copytree(path, folder / name)
    return folder


@pytest.fixture
def here(tmp_path, base, adapters) -> Here:
    return Here(tmp_path, base, adapters)


def mixed_rows() -> list[dict]:
    rows = [
        {"id": f"{name}/{number}", "input": f"row {number}", "adapter": name}
        for number in range(5)
        for name in ("", "red", "green", "blue")
    ]
    return [
        *rows,
        {"id": "nobody", "input": "x", "adapter": "nobody"},
        {"input": "none of its own"},
        {"inptu": 1},
    ]


def test_lines_are_to_the_byte_those_of_a_worker(mill, here, base, adapters):
    rows, queue = mixed_rows(), mill.queue()
    queue.send(id="same", inputs=rows, adapters="blue", parameters=TOKENS, output={"uri": PREFIX})
    where = {"LORAMILL_MODEL": str(base), "LORAMILL_ADAPTERS_DIR": str(adapters)}
    with mill.worker(LORAMILL_QUEUE_URL=queue.url, LORAMILL_ADAPTER_WAIT_SECONDS="0", **where):
        here.write("in.jsonl", rows)
        given = [word for name, value in TOKENS.items() for word in ("-p", f"{name}={json.dumps(value)}")]
        told = here.run("-i", "in.jsonl", "-o", "out.jsonl", "--adapter", "blue", *given, code=1)
        theirs = wait_until(lambda: mill.manifest("same"), "the manifest")
    assert "23 of 23 rows" in told
    assert "2 of 23 rows failed: see their error" in told
    data = (here.folder / "out.jsonl").read_bytes()
    assert data == mill.read("out/same/results-00000-of-00001.jsonl")
    *answered, nobody, bare, wrong = here.lines("out.jsonl")
    assert nobody["error"]["code"] == "adapter_not_found"
    assert wrong["error"]["code"] == "invalid_line"
    assert bare["adapter"] == "blue"
    assert len({line["generated_text"] for line in answered}) > 10
    ours = here.manifest("out.jsonl")
    for name in ("status", "request_counts", "error_counts", "usage", "adapters"):
        assert ours[name] == theirs[name], name
    assert set(ours) == set(theirs)
    assert ours["outputs"][0]["sha256"] == theirs["outputs"][0]["sha256"]


def test_two_processes_that_share_the_model_write_the_same_lines(here):
    here.write("in.jsonl", mixed_rows())
    given = ["-i", "in.jsonl", "--adapter", "blue", "-p", "max_new_tokens=24", "-p", "ignore_eos=true"]
    here.run(*given, "-o", "one.jsonl", code=1)
    here.run(*given, "-o", "two.jsonl", "--tensor-parallel-degree", "2", code=1)
    assert here.lines("two.jsonl") == here.lines("one.jsonl")
    assert sum(line["error"] is None for line in here.lines("two.jsonl")) == 21
    said = here.run(*given, "-o", "three.jsonl", "--tensor-parallel-degree", "3", code=1)
    assert "tensor_parallel_degree 3 does not divide" in said


def test_a_run_that_is_killed_again_and_again_says_what_an_undisturbed_one_says(here):
    rows = [
        {
            "input": f"row {number}",
            "adapter": ["", "red", "green"][number % 3],
            "parameters": {"max_new_tokens": 40, "ignore_eos": True}
            | ({"temperature": 2.0} if number % 2 else {}),
        }
        for number in range(120)
    ]
    here.write("in.jsonl", rows)
    command = ["-i", "in.jsonl", "-o", "out.jsonl", "--max-num-seqs", "2", "--max-passed-over", "2"]
    partial = here.folder / ".out.jsonl.partial"
    chance, before = random.Random(6), b""
    kills = [(1, signal.SIGKILL), (15, signal.SIGKILL), (30, signal.SIGINT)]

    def whole() -> bytes:
        data = partial.read_bytes() if partial.exists() else b""
        return data[: data.rfind(b"\n") + 1]

    for least, number in kills:
        with here.start(*command) as process:
            try:
                wait_until(lambda least=least: whole().count(b"\n") >= least, "lines", PATIENCE_SECONDS)
                time.sleep(chance.uniform(0.0, 0.1))
                if least == 1:
                    process.send_signal(signal.SIGSTOP)
                    assert "another run is at work" in here.run(*command, code=1)
                process.send_signal(number)
                _, err = process.communicate(timeout=PATIENCE_SECONDS)
            finally:
                process.kill()
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), err
        after = whole()
        done = after.count(b"\n")
        assert not (here.folder / "out.jsonl").exists(), "the kill came too late to tell"
        assert after.startswith(before), "what is there stays"
        if number != signal.SIGKILL:
            assert f"{done} of 120 rows are done; the same command goes on" in err
            assert "Traceback" not in err
        elif after:
            with partial.open("ab") as file:
                file.write(after.splitlines()[0][: chance.randrange(1, 40)])  # in the middle of a line
        before = after
    assert "120 of 120 rows" in here.run(*command[:4])
    data = (here.folder / "out.jsonl").read_bytes()
    assert data.startswith(before)
    assert sorted(path.name for path in here.folder.iterdir()) == [
        "in.jsonl",
        "out.jsonl",
        "out.jsonl.manifest.json",
    ]
    here.run("-i", "in.jsonl", "-o", "undisturbed.jsonl")
    assert data == (here.folder / "undisturbed.jsonl").read_bytes()
    assert [line["index"] for line in here.lines("out.jsonl")] == list(range(120))


def test_packed_rows_are_scored_into_a_packed_file(here):
    rows = [
        {"input": "The first", "target": " line", "adapter": name} for name in ("", "red", "green", "blue")
    ]
    here.write("in.jsonl.gz", [*rows, {"input": "a text by itself"}])
    here.run("-i", "in.jsonl.gz", "-o", "out.jsonl.gz", "--task", "score", "-p", "details=true")
    *scored, whole = here.lines("out.jsonl.gz")
    assert len({line["logprob"] for line in scored}) == 4
    for line in scored:
        assert line["logprob"] == pytest.approx(sum(line["token_logprobs"]))
        assert "".join(token["text"] for token in line["details"]["tokens"]) == " line"
    assert len(whole["token_logprobs"]) == len("a text by itself") - 1
    assert here.manifest("out.jsonl.gz")["status"] == "completed"


def test_requests_of_openai_from_a_pipe_become_lines_of_openai(here, base, adapter_paths):
    body = {"prompt": "The first line", "max_tokens": 8, "temperature": 0}
    names = {base.name: None, **adapter_paths}
    rows = [
        {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {"model": name, **body}}
        for name in [*names, "nobody"]
    ]
    here.write("in.jsonl", rows)
    with (here.folder / "in.jsonl").open() as file:
        here.run("-i", "-", "-o", "out.jsonl", "--format", "openai", code=1, stdin=file)
    *answered, nobody = here.lines("out.jsonl")
    prompt = tiny.tokenizer().encode(body["prompt"])
    for (name, folder), line in zip(names.items(), answered, strict=True):
        found = line["response"]["body"]
        (tokens,) = tiny.peft_generate(base, folder, [prompt], 8)
        assert (line["custom_id"], found["model"]) == (name, name)
        assert found["choices"][0]["text"] == tiny.tokenizer().decode(tokens, skip_special_tokens=True)
    assert (nobody["custom_id"], nobody["error"]["code"]) == ("nobody", "adapter_not_found")
    assert here.manifest("out.jsonl")["request_counts"] == {"total": 5, "completed": 4, "failed": 1}
