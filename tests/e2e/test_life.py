"""Workers that are started, stopped and killed."""

import contextlib
import hashlib
import json
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from tests.e2e.conftest import BUCKET, PATIENCE_SECONDS, wait_until

ROWS = 6
SLOW = ["--max-num-seqs", "2", "--visibility-timeout-seconds", "10"]
LONG = {"max_new_tokens": 40, "ignore_eos": True}


@pytest.fixture(scope="module", autouse=True)
def idle_worker(mill, versions):
    """Started first and looked at last, since its one poll takes 20 s."""
    with mill.worker("--sync", "--exit-when-idle", "1", LORAMILL_QUEUE_URL=mill.queue().url) as worker:
        yield worker


def send_long_job(queue, job_id, rows=ROWS):
    queue.send(
        id=job_id,
        inputs=[f"{job_id} {n}" for n in range(rows)],
        adapters=["red" if n % 2 else "" for n in range(rows)],
        parameters=LONG,
    )


def test_rows_survive_kills_at_any_moment_and_are_committed_once(mill, versions):
    queue = mill.queue()
    jobs = [f"kill-{n}" for n in range(5)]
    for job in jobs:
        send_long_job(queue, job)
    rng = random.Random(20)
    with contextlib.ExitStack() as stack:
        alive = [
            stack.enter_context(mill.worker("--sync", *SLOW, LORAMILL_QUEUE_URL=queue.url)) for _ in range(3)
        ]
        for _ in range(2):

            def at_work():
                return next((one for one in alive if one.metric("loramill_tokens_total") > 0), None)

            victim = wait_until(at_work, "a worker at work")
            time.sleep(rng.uniform(0.0, 1.0))
            victim.popen.kill()
            victim.end()
            alive.remove(victim)
        before = {job: manifest for job in jobs if (manifest := mill.manifest(job))}
        wait_until(lambda: queue.counts() == (0, 0) and all(map(mill.manifest, jobs)), "every job")
    assert len(before) < len(jobs), "the kills came too late to tell"
    assert queue.dead == 0
    for job in jobs:
        manifest, lines = mill.manifest(job), mill.results(job)
        assert [line["index"] for line in lines] == list(range(ROWS))
        assert all(line["error"] is None and line["generated_text"] for line in lines)
        assert manifest["status"] == "completed"
        (output,) = manifest["outputs"]
        body = mill.read(output["uri"].removeprefix(f"s3://{BUCKET}/"))
        assert output["sha256"] == hashlib.sha256(body).hexdigest()
        assert len(mill.keys(f"out/{job}/")) == 2
        assert before.get(job, manifest) == manifest, "a committed job is left as it is"


def test_first_signal_drains_and_gives_back_what_comes_late(mill, versions):
    queue = mill.queue()
    send_long_job(queue, "drained", rows=12)
    with mill.worker("--sync", *SLOW, LORAMILL_QUEUE_URL=queue.url) as worker:
        worker.wait_at_work()
        worker.popen.send_signal(signal.SIGTERM)
        worker.wait_for(503, "draining\n")
        # The poll under way brings this one, which is for others now.
        send_long_job(queue, "late")
        assert worker.end() == 0
    assert mill.manifest("drained")["status"] == "completed"
    assert mill.manifest("late") is None
    assert queue.counts() == (1, 0), "visible at once"


def test_second_signal_ends_at_once_and_the_job_is_visible(mill, versions):
    queue = mill.queue()
    send_long_job(queue, "hurried", rows=50)
    with mill.worker("--sync", *SLOW, LORAMILL_QUEUE_URL=queue.url) as worker:
        worker.wait_at_work()
        worker.popen.send_signal(signal.SIGTERM)
        worker.wait_for(503, "draining\n")
        began = time.monotonic()
        worker.popen.send_signal(signal.SIGINT)
        assert worker.end() == 0
        assert time.monotonic() - began < 10
        assert "Traceback" not in worker.text
    assert mill.keys("out/hurried/") == []
    assert queue.counts() == (1, 0)


def test_worker_that_loses_a_rank_gives_its_job_back_and_the_next_completes_it(mill, versions):
    queue = mill.queue()
    send_long_job(queue, "shared", rows=10)
    told, patience = ["--sync", "--tensor-parallel-degree", "2"], 3 * PATIENCE_SECONDS
    with mill.worker(*told, "--max-num-seqs", "2", LORAMILL_QUEUE_URL=queue.url) as worker:
        wait_until(lambda: worker.metric("loramill_tokens_total") > 0, "a step", patience)
        (rank,) = psutil.Process(worker.popen.pid).children()
        rank.kill()
        assert worker.end() == 1
        assert "of the model" in worker.text or "Connection closed" in worker.text
    assert queue.counts() == (1, 0), "visible at once"
    with mill.worker(*told, LORAMILL_QUEUE_URL=queue.url) as worker:
        wait_until(lambda: mill.manifest("shared"), "the manifest", patience)
        (rank,) = psutil.Process(worker.popen.pid).children()
        worker.popen.send_signal(signal.SIGTERM)
        assert worker.end() == 0, worker.text
    assert not rank.is_running()
    assert mill.manifest("shared")["status"] == "completed"


def test_a_model_that_is_none_is_one_readable_line(mill, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-thing"}))
    models = [str(tmp_path), f"s3://{BUCKET}/nothing/"]
    queue = mill.queue()

    def start(model):
        cache = str(tmp_path / "cache" / str(models.index(model)))
        told = {"LORAMILL_MODEL": model, "LORAMILL_CACHE_DIR": cache, "LORAMILL_HTTP_PORT": "0"}
        return mill.run("worker", LORAMILL_QUEUE_URL=queue.url, **told)

    with ThreadPoolExecutor() as threads:
        ends = list(threads.map(start, models))
    for model, done in zip(models, ends, strict=True):
        assert done.returncode == 1, done.stderr
        said = [line for line in done.stderr.splitlines() if not line.startswith("{")]
        assert len(said) == 1, done.stderr
        assert said[0].startswith("loramill: ")
        assert model in said[0]


def test_an_idle_worker_ends_well(idle_worker):
    assert idle_worker.end() == 0, idle_worker.text
