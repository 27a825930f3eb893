"""A proxy between the SDK and moto's server that makes faults, and keeps rules that moto does not keep."""

import asyncio
import io
import json
import random
import threading
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from typing import Any, Self

import aiohttp
from aiohttp import web
from yarl import URL

from tests.faults.batches import Batch
from tests.faults.calls import Call, read_call
from tests.faults.kinds import Answer, Fault, refusal
from tests.faults.plans import Plan
from tests.faults.receipts import Receipts

_POLL_SECONDS = 0.25
_MAX_BODY_BYTES = 1 << 30
_STORE = frozenset({"PutObject", "CompleteMultipartUpload"})
# Of one connection, and there are two of them.
_HOP_BY_HOP = frozenset({"connection", "content-length", "expect", "keep-alive", "transfer-encoding"})

Gate = Callable[[Call], Awaitable[None]]


async def _open(_: Call) -> None:
    """The gate that lets all calls through."""


class Proxy:
    """`with Proxy(server, plan) as proxy`: what goes to `proxy.endpoint` goes on to the moto server.

    Long polls are turned into short ones, calls to SQS go on one after the other, and so do writes of one
    object: moto's threads lose messages in such races, and may let two conditional PUTs win. Receipts that
    are stale or over are refused, as SQS does it and moto does not. `gate` is awaited before each call, on
    the proxy's own event loop; a test may hold a call there. Delays last between the two `delay_seconds`.

    With `longest_hidden_seconds` no visibility time-out is longer: a worker's back-off says nothing about
    what is lost, and a test must end.
    """

    def __init__(
        self,
        server: str,
        plan: Plan | None = None,
        *,
        gate: Gate = _open,
        delay_seconds: tuple[float, float] = (0.1, 1.0),
        longest_hidden_seconds: int | None = None,
        seed: int = 0,
    ) -> None:
        self.plan = plan or Plan()
        self.gate = gate
        self.delay_seconds = delay_seconds
        self.longest_hidden_seconds = longest_hidden_seconds
        self.calls: Counter[str] = Counter()
        """Attempts at calls, by operation."""
        self.injected: Counter[Fault] = Counter()
        """Faults that struck."""
        self.written: Counter[str] = Counter()
        """How often each object was stored, by `bucket/key`."""
        self._server = server
        self._random = random.Random(seed)
        self._receipts = Receipts()
        self._queues = asyncio.Lock()
        self._writes: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="faults", daemon=True)
        self._started = threading.Event()
        self._port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(10), "the proxy did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=60),
            auto_decompress=False,
        )
        app = web.Application(client_max_size=_MAX_BODY_BYTES)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        async with self._session:
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self._port = runner.addresses[0][1]
            self._started.set()
            await self._stop.wait()
            await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await request.read()
        except ConnectionError:  # a client that was killed while it spoke
            return web.Response()
        port = request.transport.get_extra_info("peername")[1] if request.transport else 0
        call = read_call(request.method, request.raw_path, request.headers, body, port)
        self.calls[call.operation] += 1
        await self.gate(call)
        fault = self.plan.choose(call)
        if fault is None:
            return _response(await self._serve(request, call, body))
        if fault.is_late:
            return await self._late(fault, request, call, body)
        self.injected[fault] += 1
        return _dropped(request) if fault is Fault.DROP else _response(refusal(fault, call))

    async def _late(self, fault: Fault, request: web.Request, call: Call, body: bytes) -> web.StreamResponse:
        """A fault of a call that is done."""
        if fault is Fault.DELAY:
            await asyncio.sleep(self._random.uniform(*self.delay_seconds))
        answer = await self._serve(request, call, body, fault)
        if fault in {Fault.PARTIAL, Fault.LATE_PARTIAL, Fault.DUPLICATE}:
            return _response(answer)  # they were counted if they found something to strike
        if fault is Fault.TRUNCATE and not (answer.status < 300 and answer.body):
            return _response(answer)
        self.injected[fault] += 1
        match fault:
            case Fault.LATE_ERROR:
                return _response(refusal(fault, call))
            case Fault.LATE_DROP:
                return _dropped(request)
            case Fault.TRUNCATE:
                return await _truncated(request, answer, self._random.randrange(len(answer.body)))
        return _response(answer)

    async def _serve(
        self, request: web.Request, call: Call, body: bytes, fault: Fault | None = None
    ) -> Answer:
        """Have the server do it, by the rules of the service."""
        if call.service == "s3":
            if request.method in {"GET", "HEAD"}:
                return await self._forward(request, body)
            async with self._writes[call.target]:
                answer = await self._forward(request, body)
            if call.operation in _STORE and answer.status == 200:
                self.written[call.target] += 1
            return answer
        if "X-Amz-Target" in request.headers:
            if call.operation == "ReceiveMessage":
                return await self._receive(request, json.loads(body), fault)
            if call.is_batch:
                return await self._batch(request, call, json.loads(body), fault)
        async with self._queues:
            return await self._forward(request, body)

    async def _receive(self, request: web.Request, fields: dict[str, Any], fault: Fault | None) -> Answer:
        end = self._loop.time() + float(fields.get("WaitTimeSeconds") or 0)
        while True:
            async with self._queues:
                answer = await self._forward(request, _json(fields | {"WaitTimeSeconds": 0}))
                messages = json.loads(answer.body).get("Messages", []) if answer.status == 200 else []
                for message in messages:
                    seconds = fields.get("VisibilityTimeout")
                    self._receipts.received(message["MessageId"], message["ReceiptHandle"], seconds)
                if messages and fault is Fault.DUPLICATE:
                    self.injected[fault] += 1
                    await self._show(request, fields["QueueUrl"], [one["ReceiptHandle"] for one in messages])
            if messages or answer.status != 200 or self._loop.time() >= end or self._stop.is_set():
                return answer
            await asyncio.sleep(_POLL_SECONDS)

    async def _show(self, request: web.Request, queue_url: str, receipts: list[str]) -> None:
        """Let everybody receive these messages, though somebody has them."""
        entries = [
            {"Id": str(at), "ReceiptHandle": receipt, "VisibilityTimeout": 0}
            for at, receipt in enumerate(receipts)
        ]
        body = _json({"QueueUrl": queue_url, "Entries": entries})
        await self._forward(request, body, {"X-Amz-Target": "AmazonSQS.ChangeMessageVisibilityBatch"})
        for receipt in receipts:
            self._receipts.changed(receipt, 0)

    async def _batch(
        self, request: web.Request, call: Call, fields: dict[str, Any], fault: Fault | None
    ) -> Answer:
        async with self._queues:
            batch = Batch(call.operation, fields["Entries"])
            batch.refuse_stale(self._receipts)
            if self.longest_hidden_seconds is not None:
                batch.shorten(self.longest_hidden_seconds)
            if fault is Fault.PARTIAL:
                self.injected[fault] += batch.fail_one(self._random)
            if batch.left:
                answer = await self._forward(request, _json(fields | {"Entries": batch.left}))
                if answer.status != 200:
                    return answer
                batch.take(json.loads(answer.body), self._receipts)
            if fault is Fault.LATE_PARTIAL:
                self.injected[fault] += batch.deny_one(self._random)
            headers = {"Content-Type": "application/x-amz-json-1.0"}
            return Answer(200, headers, _json(batch.answer))

    async def _forward(
        self, request: web.Request, body: bytes, changes: dict[str, str] | None = None
    ) -> Answer:
        """The `Host` stays the client's: moto makes the URLs of queues of it."""
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
        url = URL(self._server + request.raw_path, encoded=True)
        sent = self._session.request(
            request.method,
            url,
            headers=headers | (changes or {}),
            data=io.BytesIO(body) if body else None,
            skip_auto_headers=["Content-Type"],
            allow_redirects=False,
        )
        async with sent as answer:
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP_BY_HOP}
            if request.method == "HEAD":
                kept["Content-Length"] = answer.headers.get("Content-Length", "0")
            return Answer(answer.status, kept, await answer.read())


def _json(fields: object) -> bytes:
    return json.dumps(fields).encode()


def _response(answer: Answer) -> web.Response:
    return web.Response(status=answer.status, headers=answer.headers, body=answer.body)


def _dropped(request: web.Request) -> web.Response:
    """The connection breaks; what is returned reaches nobody."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


async def _truncated(request: web.Request, answer: Answer, length: int) -> web.StreamResponse:
    """The head announces the whole body, of which `length` bytes come."""
    response = web.StreamResponse(status=answer.status, headers=answer.headers)
    response.content_length = len(answer.body)
    await response.prepare(request)
    await response.write(answer.body[:length])
    if request.transport is not None:
        request.transport.close()
    return response
