"""The README's examples of whole workers, run as they stand there."""

import shutil

import pytest

from tests.e2e.conftest import PREFIX, Mill, Process, wait_until
from tests.e2e.test_calls import call
from tests.test_docs import blocks

QUEUE = "https://sqs.eu-central-1.amazonaws.com/123456789012/jobs"


def test_a_folder_of_djl_serving_s_answers_jobs_and_calls(
    mill: Mill, base, adapter_paths, monkeypatch: pytest.MonkeyPatch
):
    model = mill.folder / mill.new_name() / "llama"
    shutil.copytree(base, model)
    properties = next(block for block in blocks("properties") if "option." in block)
    (model / "serving.properties").write_text(properties.replace("./llama", str(model)))
    for name, path in zip(("pirate", "robot"), adapter_paths.values(), strict=False):
        shutil.copytree(path, model / "adapters" / name)
    command = next(block for block in blocks("sh") if "worker --model ./llama --queue-url" in block)
    queue = mill.queue()
    said = command.replace("\\\n", " ").replace("./llama", str(model)).replace(QUEUE, queue.url)
    flags = said.replace("s3://bucket/results/", PREFIX).split()[2:]
    assert flags[::2] == ["--model", "--queue-url", "--output-prefixes"]

    with mill.worker(*flags) as worker:
        worker.wait_ready()
        assert "option rolling_batch chooses among DJL Serving's ways and changes nothing here" in worker.text
        for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
            monkeypatch.setenv(name, mill.environ[name])
        exec(next(block for block in blocks("python") if "by-attribute" in block), {"QUEUE_URL": queue.url})
        jobs = ("by-body", "by-attribute", "by-header")
        wait_until(lambda: all(mill.manifest(job) for job in jobs), "three jobs")
        body, attribute, header = (mill.results(job) for job in jobs)
        assert [line["adapter"] for line in body] == ["pirate", "robot", ""]
        assert [line["adapter"] for line in attribute] == ["pirate"] * 3
        assert [line["adapter"] for line in header] == ["robot"] * 3
        texts = [line["generated_text"] for line in body]
        assert len({*texts}) == 3
        assert {line["generated_text"] for line in attribute} == {texts[0]}
        assert {line["generated_text"] for line in header} == {texts[1]}

        status, answer = call(worker, {"inputs": ["Who goes there?"] * 2, "adapters": ["robot", ""]})
        assert (status, [one["generated_text"] for one in answer]) == (200, texts[1:])

        shutil.copytree(adapter_paths["blue"], model / "adapters" / "late")
        _, late = call(worker, {"inputs": "Who goes there?", "adapters": "late"})
        assert late["generated_text"] not in texts
        shutil.rmtree(model / "adapters" / "late")
        assert call(worker, {"inputs": "Who goes there?", "adapters": "late"})[0] == 424


def test_a_worker_of_one_workflow_has_its_model_and_answers_by_it(mill: Mill, base, adapter_paths):
    folder = mill.folder / mill.new_name()
    shutil.copytree(adapter_paths["red"], folder / "polite" / "pirate")
    said = next(block for block in blocks("json") if '"workflow"' in block)
    (folder / "polite" / "workflow.json").write_text(said.replace("s3://bucket/llama/", str(base)))
    command = next(line for line in "\n".join(blocks("sh")).splitlines() if "worker --workflows ./" in line)
    flags = command.partition("#")[0].replace("./polite", str(folder / "polite")).split()[2:]
    environ = {
        name: value
        for name, value in mill.environ.items()
        if not name.startswith("AWS_") and name not in {"LORAMILL_OUTPUT_PREFIXES", "LORAMILL_MODEL"}
    }
    worker = Process([*flags, "--cache-dir", str(folder / "c")], environ, folder / "log")
    try:
        worker.wait_ready()
        asked = {"inputs": "Who goes there?", "parameters": {"max_new_tokens": 8}}
        answers = [
            call(worker, asked, path)
            for path in ("/invocations", "/predictions/polite", f"/predictions/{base.name}")
        ]
        assert [status for status, _ in answers] == [200] * 3
        plain, named, model = (answer["generated_text"] for _, answer in answers)
        assert plain == named != model
    finally:
        worker.popen.kill()
        worker.popen.wait(30)
