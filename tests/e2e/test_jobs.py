"""Jobs through one running worker, with the mirror inside it."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from tests import tiny
from tests.e2e.conftest import BUCKET, PREFIX, Mill, Process, Queue, wait_until
from tests.glue.malformed import MALFORMED

PROMPTS = ["The first line", "b", "Something longer than the others, by far."]
TOKENS = 12


@pytest.fixture(scope="module")
def queue(mill: Mill) -> Queue:
    return mill.queue()


@pytest.fixture(scope="module")
def worker(mill: Mill, queue: Queue, versions: dict[str, str]) -> Iterator[Process]:
    """Less room for adapters than there are adapters."""
    flags = ["--max-loras", "2", "--max-cpu-loras", "2", "--max-num-seqs", "4", "--max-rows-per-job", "50"]
    flags += ["--rows-per-part", "30", "--input-prefixes", f"s3://{BUCKET}/in/"]
    with mill.worker("--sync", *flags, LORAMILL_QUEUE_URL=queue.url) as process:
        process.wait_ready()
        yield process


def enqueue(mill: Mill, queue: Queue, *arguments: str) -> list[dict[str, Any]]:
    """A job by the command, waited for; its result lines."""
    done = mill.run("enqueue", *arguments, "--wait", "60", LORAMILL_QUEUE_URL=queue.url)
    job_id, *texts = done.stdout.splitlines()
    assert mill.manifest(job_id)
    lines = [json.loads(text) for text in texts]
    assert done.returncode == int(any(line["error"] for line in lines)), done.stderr
    return lines


def expected(base: Path, adapter: Path | None, prompts: list[str]) -> list[tuple[list[int], str]]:
    """Tokens and text that PEFT itself makes of each prompt."""
    tokenizer = tiny.tokenizer()
    generated = tiny.peft_generate(base, adapter, [tokenizer.encode(text) for text in prompts], TOKENS)
    return [(tokens, tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in generated]


def assert_says(line: dict[str, Any], tokens: list[int], text: str) -> None:
    assert line["error"] is None
    assert [token["id"] for token in line["details"]["tokens"]] == tokens
    assert line["generated_text"] == text
    assert line["usage"]["completion_tokens"] == len(tokens)


def test_mixed_job_says_what_peft_says(mill, queue, worker, base, adapter_paths, versions, tmp_path):
    names = [None, *adapter_paths]
    rows = [(name, text) for text in PROMPTS for name in names]
    lines = [{"id": f"{name}/{text}", "input": text, "adapter": name} for name, text in rows]
    lines.append({"id": "nobody", "input": "x", "adapter": "nobody"})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    parameters = ["-p", f"max_new_tokens={TOKENS}", "-p", "details=true"]
    *results, nobody = enqueue(mill, queue, "--file", str(file), *parameters, "--id", "mixed")

    wanted = {}
    for name in names:
        for text, answer in zip(PROMPTS, expected(base, adapter_paths.get(name), PROMPTS), strict=True):
            wanted[name, text] = answer
    assert len({text for _, text in wanted.values()}) > len(wanted) // 2
    for (name, text), line in zip(rows, results, strict=True):
        assert (line["id"], line["adapter"]) == (f"{name}/{text}", name or "")
        assert line["adapter_version"] == versions.get(name)
        assert_says(line, *wanted[name, text])
    assert nobody["error"]["code"] == "adapter_not_found"
    assert nobody["generated_text"] is None

    saved = tmp_path / "saved.jsonl.gz"
    done = mill.run("results", "mixed", "--to", str(saved))
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "1 of 13 rows failed" in done.stderr
    with gzip.open(saved) as file:
        assert [json.loads(line) for line in file] == [*results, nobody]

    manifest = mill.manifest("mixed")
    assert manifest["status"] == "completed_with_errors"
    assert manifest["request_counts"] == {"total": 13, "completed": 12, "failed": 1}
    assert manifest["adapters"] == versions
    wait_until(lambda: queue.counts() == (0, 0), "an empty queue")


def test_requests_of_an_openai_batch_file_are_answered_as_openai_would(
    mill, queue, worker, base, adapter_paths, versions
):
    names = {"tiny": None, **adapter_paths}
    body = {"prompt": PROMPTS[0], "max_tokens": TOKENS, "temperature": 0}
    lines = [
        {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {"model": name, **body}}
        for name in names
    ]
    chat = {
        "model": "red",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 3,
        "logprobs": True,
    }
    lines.append({"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": chat})
    lines.append({"custom_id": "bad", "method": "POST", "url": "/v1/embeddings", "body": {}})
    queue.send(id="openai", inputs=lines, output={"uri": PREFIX, "format": "openai"})
    manifest = wait_until(lambda: mill.manifest("openai"), "the manifest")
    assert manifest["adapters"] == versions
    assert manifest["request_counts"] == {"total": 6, "completed": 5, "failed": 1}
    *completions, answer, bad = mill.results("openai")
    for (name, folder), line in zip(names.items(), completions, strict=True):
        found = line["response"]["body"]
        ((_, text),) = expected(base, folder, PROMPTS[:1])
        assert (found["model"], found["system_fingerprint"]) == (name, versions.get(name))
        assert found["choices"][0]["text"] == text
    assert answer["response"]["body"]["object"] == "chat.completion"
    assert len(answer["response"]["body"]["choices"][0]["logprobs"]["content"]) == 3
    assert (bad["custom_id"], bad["response"], bad["error"]["code"]) == ("bad", None, "invalid_line")


def test_scores_are_those_of_the_plain_model(mill, queue, worker, base, adapter_paths):
    """Of the tokens that PEFT itself says, which are thereby greedy."""
    tokenizer = tiny.tokenizer()
    rows, wanted = [], []
    for folder in (None, *adapter_paths.values()):
        ((tokens, _),) = expected(base, folder, PROMPTS[:1])
        prompt = tokenizer.encode(PROMPTS[0])
        rows.append({"input": prompt, "target": tokens, "adapter": folder and folder.name})
        wanted.append(log_probs_of(base, folder, prompt, tokens))
    queue.send(id="scores", inputs=[*rows, "a text by itself"], task="score")
    wait_until(lambda: mill.manifest("scores"), "the manifest")
    *scored, whole = mill.results("scores")
    for line, log_probs in zip(scored, wanted, strict=True):
        assert line["token_logprobs"] == pytest.approx(log_probs, abs=1e-4)
        assert line["logprob"] == pytest.approx(sum(log_probs), abs=1e-3)
        assert line["is_greedy"]
    assert len(whole["token_logprobs"]) == len("a text by itself") - 1


def log_probs_of(base: Path, adapter: Path | None, prompt: list[int], target: list[int]) -> list[float]:
    """Log-softmax of transformers' own logits, under PEFT if there is an adapter."""
    model: Any = tiny.load_base(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(target).unsqueeze(1)).squeeze(1).tolist()


def test_adapter_that_comes_or_changes_while_the_worker_runs_is_used(mill, queue, worker, base, tmp_path):
    asked = ["hello", "-a", "late", "-p", f"max_new_tokens={TOKENS}", "-p", "details=true"]
    texts = set()
    for seed in (11, 12):
        path = tiny.make_adapter(tmp_path / f"late{seed}", base, seed=seed, r=4, target_modules=tiny.MLP)
        version = mill.push(path, "late")

        def serves(version: str = version) -> dict[str, Any] | None:
            (line,) = enqueue(mill, queue, *asked)
            return line if line["adapter_version"] == version else None

        line = wait_until(serves, f"version {version}", 30)
        ((tokens, text),) = expected(base, path, ["hello"])
        assert_says(line, tokens, text)
        texts.add(text)
    assert len(texts) == 2
    assert worker.popen.poll() is None


def test_malformed_messages_do_not_stop_the_worker_and_each_is_accounted_for(mill, queue, worker):
    sent = {name: queue.send(_here(bad.body), bad.attributes) for name, bad in MALFORMED.items()}
    (line,) = enqueue(mill, queue, "still here", "--id", "after")
    assert line["error"] is None
    wait_until(lambda: queue.counts() == (0, 0), "an empty queue")
    for name, message_id in sent.items():
        bad = MALFORMED[name]
        if bad.leaves == "manifest":
            manifest = mill.manifest(bad.job_id or message_id)
            assert manifest is not None, name
            assert (manifest["status"], manifest["error"]["code"]) == ("failed", "invalid_message")
            assert bad.says in manifest["error"]["message"], name
        else:
            letter = json.loads(mill.read(f"out/dead-letter/{message_id}.json"))
            assert letter["body"] == _here(bad.body)
    assert queue.dead == 0


def test_attribute_names_the_adapter_of_every_row(mill, queue, worker, versions):
    attributes = {"adapter": "red", "X-Amzn-SageMaker-Adapter-Identifier": "green"}
    queue.send(attributes=attributes, id="attribute", inputs=["a", "b"], adapters="blue")
    wait_until(lambda: mill.manifest("attribute"), "the manifest")
    assert {line["adapter_version"] for line in mill.results("attribute")} == {versions["green"]}


def test_the_running_worker_tells_of_itself(mill, queue, worker):
    enqueue(mill, queue, "one more")
    assert worker.get("/live") == (200, "live\n")
    assert worker.get("/ready") == (200, "ready\n")
    assert worker.metric('loramill_messages_total{outcome="committed"}') >= 1
    assert worker.metric('loramill_messages_total{outcome="lost"}') == 0
    assert worker.metric("loramill_ready ") == 1
    assert "one more" not in worker.text, "prompts are not logged"


def test_the_log_says_where_the_worker_listens_and_what_it_commits(mill, queue, worker):
    enqueue(mill, queue, "one more")
    assert {"listening", "model loaded", "ready", "job committed"} <= set(worker.said())


def _here(body: str) -> str:
    """A message of the glue tests, whose prefix is another."""
    return body.replace("s3://out/jobs/", PREFIX)


@pytest.mark.parametrize("packed", [False, True])
def test_large_input_is_split_and_every_row_is_answered_once(mill, queue, worker, packed):
    names = ["", "red", "green", "blue", "nobody"]
    rows = [
        {"id": f"r{n}", "input": PROMPTS[n % 3], "adapter": names[n % 5], "parameters": {"max_new_tokens": 2}}
        for n in range(100)
    ]
    data = b"\n".join(json.dumps(row).encode() for row in rows)
    key = f"in/{mill.new_name()}.jsonl{'.gz' if packed else ''}"
    mill.s3.put_object(Bucket=BUCKET, Key=key, Body=gzip.compress(data) if packed else data)
    job = mill.new_name()
    queue.send(id=job, input={"uri": f"s3://{BUCKET}/{key}"}, output={"uri": PREFIX})
    manifest = wait_until(lambda: mill.manifest(job), "the manifest")
    assert manifest["request_counts"] == {"total": 100, "completed": 80, "failed": 20}
    assert manifest["error_counts"] == {"adapter_not_found": 20}
    assert len(manifest["outputs"]) == 4
    found = mill.results(job)
    assert [(line["id"], line["index"], line["adapter"]) for line in found] == [
        (f"r{n}", n, names[n % 5]) for n in range(100)
    ]
    said = {}
    for line in found:
        said.setdefault((line["adapter"], line["index"] % 3), set()).add(line["generated_text"])
    assert all(len(texts) == 1 for texts in said.values()), "the same row is the same text in any part"
    wait_until(lambda: queue.counts() == (0, 0), "an empty queue")


def test_input_outside_the_prefixes_fails_the_job(mill, queue, worker):
    job = mill.new_name()
    queue.send(id=job, input={"uri": f"s3://{BUCKET}/tiny/config.json"}, output={"uri": PREFIX})
    manifest = wait_until(lambda: mill.manifest(job), "the manifest")
    assert manifest["error"]["code"] == "forbidden_input"


def test_a_body_that_lies_in_s3_is_a_job(mill, queue, worker):
    job, key = mill.new_name(), f"in/{mill.new_name()}"
    body = json.dumps({"id": job, "inputs": PROMPTS, "output": {"uri": PREFIX}})
    mill.s3.put_object(Bucket=BUCKET, Key=key, Body=body.encode())
    pointer = ["software.amazon.payloadoffloading.PayloadS3Pointer", {"s3BucketName": BUCKET, "s3Key": key}]
    queue.send(json.dumps(pointer), {"ExtendedPayloadSize": str(len(body))})
    assert wait_until(lambda: mill.manifest(job), "the manifest")["request_counts"]["completed"] == 3
    wait_until(lambda: queue.counts() == (0, 0), "an empty queue")


def test_dropping_a_file_into_a_watched_prefix_is_a_job(mill, queue, worker):
    """With the store's own events: it sends one to try the queue, and one for the file."""
    arn = mill.sqs.get_queue_attributes(QueueUrl=queue.url, AttributeNames=["QueueArn"])["Attributes"][
        "QueueArn"
    ]
    rules = {"FilterRules": [{"Name": "prefix", "Value": "in/watched/"}]}
    watched = {"QueueArn": arn, "Events": ["s3:ObjectCreated:*"], "Filter": {"Key": rules}}
    mill.s3.put_bucket_notification_configuration(
        Bucket=BUCKET, NotificationConfiguration={"QueueConfigurations": [watched]}
    )
    try:
        mill.s3.put_object(Bucket=BUCKET, Key="in/watched/a file+1.jsonl", Body=b'"one"\n"two"\n')
        wait_until(lambda: any(key.endswith("/manifest.json") for key in mill.keys("out/s3-")), "a manifest")
    finally:
        mill.s3.put_bucket_notification_configuration(Bucket=BUCKET, NotificationConfiguration={})
    (name,) = {key.split("/")[1] for key in mill.keys("out/s3-")}
    assert [line["error"] for line in mill.results(name)] == [None, None]
    assert mill.manifest(name)["input"]["uri"] == f"s3://{BUCKET}/in/watched/a file+1.jsonl"
    wait_until(lambda: queue.counts() == (0, 0), "an empty queue")


def test_a_large_file_of_a_sender_is_followed_and_fetched_by_the_commands(mill, queue, worker, tmp_path):
    path, job = tmp_path / "rows.jsonl", mill.new_name()
    text = "x" * 20_000
    rows = [
        {"input": f"{n} {text}" if n % 3 else f"{n}", "parameters": {"max_new_tokens": 1}} for n in range(90)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    url = {"LORAMILL_QUEUE_URL": queue.url}
    done = mill.run("enqueue", "--file", str(path), "--id", job, **url)
    assert (done.returncode, done.stdout) == (0, f"{job}\n"), done.stderr
    done = mill.run("status", job, "--watch", "--json")
    looks = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1, "rows failed, which are too long for the model"
    assert (looks[-1]["state"], looks[-1]["parts"], looks[-1]["rows"], looks[-1]["rows_failed"]) == (
        "ended",
        3,
        90,
        60,
    )
    assert "90 of 90 (100.0%), 60 failed" in mill.run("status", job).stdout
    packed = tmp_path / "results.jsonl.gz"
    assert mill.run("results", job, "--to", str(packed)).returncode == 1
    found = [json.loads(line) for line in gzip.decompress(packed.read_bytes()).splitlines()]
    assert [line["index"] for line in found] == list(range(90))
    assert {line["error"]["code"] for line in found if line["error"]} == {"prompt_too_long"}
    assert mill.run("status", "never-sent").returncode == 1
    again = mill.run("enqueue", "--file", str(path), "--id", job, "--wait", "60", **url)
    assert again.stdout.splitlines()[1:] == gzip.decompress(packed.read_bytes()).decode().splitlines()
