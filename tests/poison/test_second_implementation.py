"""Delivery by services of others: the real worker, its objects in SeaweedFS and its queue in ministack.

Unlike moto, SeaweedFS checks signatures and checksums, and ministack refuses a stale receipt.
"""

import hashlib
import json
import signal

import pytest

from tests import tiny
from tests.e2e.conftest import BUCKET, MODEL, PATIENCE_SECONDS, PREFIX, Mill, wait_until
from tests.sync import servers

pytestmark = [
    pytest.mark.skipif(servers.weed() is None, reason=servers.WHY_NOT),
    *servers.NEEDS_MINISTACK,
]

ADAPTERS = {"red": 4, "green": 8, "blue": 2}
NAMES = ["", *ADAPTERS]
JOBS = [f"pair-{number}" for number in range(16)]
ROWS = 8
LONG = {"max_new_tokens": 40, "ignore_eos": True}


@pytest.fixture(scope="module")
def mill(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    base = tiny.make_base(folder / "base")
    with servers.seaweedfs() as s3, servers.ministack() as sqs:
        mill = Mill(s3, folder)
        mill.sqs = servers.client(sqs, service="sqs")
        del mill.environ["AWS_ENDPOINT_URL"]
        mill.environ |= {
            "AWS_ENDPOINT_URL_S3": s3,
            "AWS_ENDPOINT_URL_SQS": sqs,
            "LORAMILL_DEAD_LETTER_URI": f"s3://{BUCKET}/dead/",
        }
        mill.upload(base, "tiny/")
        for seed, (name, rank) in enumerate(ADAPTERS.items()):
            path = tiny.make_adapter(folder / name, base, seed=seed, r=rank, target_modules=tiny.ATTENTION)
            mill.upload(path, f"{MODEL.removeprefix(f's3://{BUCKET}/')}adapters/{name}/")
        yield mill


def send_job(queue, job_id):
    queue.send(
        id=job_id,
        inputs=[f"{job_id} {number}" for number in range(ROWS)],
        adapters=[NAMES[number % len(NAMES)] for number in range(ROWS)],
        parameters=LONG,
    )


def assert_committed_once(mill, job_id):
    manifest, lines = mill.manifest(job_id), mill.results(job_id)
    assert manifest["status"] == "completed"
    assert manifest["request_counts"] == {"total": ROWS, "completed": ROWS, "failed": 0}
    assert set(manifest["adapters"]) == set(ADAPTERS)
    assert [line["index"] for line in lines] == list(range(ROWS))
    for line in lines:
        assert line["adapter"] == NAMES[line["index"] % len(NAMES)]
        assert line["adapter_version"] == manifest["adapters"].get(line["adapter"])
        assert line["usage"]["completion_tokens"] == LONG["max_new_tokens"]
    (output,) = manifest["outputs"]
    body = mill.read(output["uri"].removeprefix(f"s3://{BUCKET}/"))
    assert output["sha256"] == hashlib.sha256(body).hexdigest()
    assert len(mill.keys(f"out/{job_id}/")) == 2


def test_jobs_of_many_adapters_survive_a_stop_and_every_message_is_accounted_for(mill):
    queue = mill.queue()
    letter = queue.send("no json at all")
    queue.send(id="pair-wrong", inputs="x", adaptor="red")
    queue.send(id="pair-nobody", inputs=["x", "y"], adapters=["nobody", "red"])
    done = [*JOBS, "pair-wrong", "pair-nobody"]
    flags = ["--sync", "--max-num-seqs", "4"]
    environ = {"LORAMILL_QUEUE_URL": queue.url, "LORAMILL_SETTLE_SECONDS": "1"}

    with mill.worker(*flags, **environ) as worker:
        worker.wait_ready()
        wait_until(
            lambda: worker.metric('loramill_sync_adapters{state="ready"}') == len(ADAPTERS), "adapters"
        )
        for job_id in [*JOBS, JOBS[0]]:
            send_job(queue, job_id)
        wait_until(lambda: mill.manifest(JOBS[0]), "the first job")
        worker.popen.send_signal(signal.SIGTERM)
        assert worker.end() == 0, worker.text
        assert "Traceback" not in worker.text
    assert queue.counts()[1] == 0, "what was not finished is visible at once"
    before = {job: manifest for job in done if (manifest := mill.manifest(job))}
    assert before, "what was at work is finished"
    assert len(before) < len(done), "the stop came too late to tell"

    with mill.worker(*flags, "--exit-when-idle", "2", **environ) as worker:
        assert worker.end(2 * PATIENCE_SECONDS) == 0, worker.text
        assert "Traceback" not in worker.text
    assert (queue.counts(), queue.dead) == ((0, 0), 0)
    for job_id in JOBS:
        assert_committed_once(mill, job_id)
    for job_id, manifest in before.items():
        assert mill.manifest(job_id) == manifest, "a committed job is left as it is"

    wrong = mill.manifest("pair-wrong")
    assert (wrong["status"], wrong["error"]["code"]) == ("failed", "invalid_message")
    nobody, red = mill.results("pair-nobody")
    assert (nobody["error"]["code"], red["error"]) == ("adapter_not_found", None)
    assert mill.keys("dead/") == [f"dead/{letter}.json"]
    assert json.loads(mill.read(f"dead/{letter}.json"))["body"] == "no json at all"
    assert {key.split("/")[1] for key in mill.keys("out/")} == set(done), f"nothing else lies under {PREFIX}"
