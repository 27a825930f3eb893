"""The README's example for those who come from DJL Serving, run as it stands there."""

import shutil

import pytest

from tests.e2e.conftest import PREFIX, Mill, wait_until
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
