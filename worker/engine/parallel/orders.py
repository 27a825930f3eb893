"""What rank 0 has the others do, and what they answer: messages and their bytes."""

import itertools
from collections.abc import Sequence

import msgspec
import torch

from worker.engine.adapters.adapter import LoRAPair, LoRAWeights
from worker.engine.executor import PackedRow
from worker.engine.kernels.tilings import Fit, Tiling, Work
from worker.engine.kv_cache import BlockCopy, Leftover
from worker.engine.lora_plan import Costs
from worker.engine.setup import Setup
from worker.jobs import AdapterKey


class Begin(msgspec.Struct, tag=True, frozen=True):
    """The first message to a rank."""

    setup: Setup
    rank: int
    threads: int
    place: str
    """The file where the ranks meet."""


class Meet(msgspec.Struct, tag=True, frozen=True):
    """All have loaded the model: join the group."""

    costs: Costs | None
    """What LoRA goes by on a CPU, as rank 0 found it."""


class Fitted(msgspec.Struct, tag=True, frozen=True):
    """What suits the devices, as rank 0 found it."""

    tilings: list[tuple[Work, Tiling]]
    dense_from: int | None

    @classmethod
    def of(cls, fit: Fit) -> "Fitted":
        return cls([*fit.tilings.items()], fit.dense_from)

    @property
    def fit(self) -> Fit:
        return Fit(dict(self.tilings), self.dense_from)


class Piece(msgspec.Struct, array_like=True, frozen=True):
    """Where one module's pair is among the bytes that follow a `Put`: a, then b."""

    module: str
    a: tuple[int, int]
    b: tuple[int, int]


class Put(msgspec.Struct, tag=True, frozen=True):
    """Put into a slot the adapter whose bytes are the next message; to be answered."""

    slot: int
    name: str
    version: str
    rope_factor: float
    dtype: str
    pieces: list[Piece]


class Run(msgspec.Struct, tag=True, frozen=True):
    """A step."""

    rows: list[PackedRow]
    latest: int | None
    """How many tokens of the last step rank 0 is about to hand out; None if no row goes on with one."""


class RunUncached(msgspec.Struct, tag=True, frozen=True):
    """See Executor."""

    prompts: list[list[int]]


class Scrub(msgspec.Struct, tag=True, frozen=True):
    """See Executor."""

    leftovers: list[Leftover]


class Copy(msgspec.Struct, tag=True, frozen=True):
    """See Executor."""

    copies: list[BlockCopy]


class Resume(msgspec.Struct, tag=True, frozen=True):
    """All ranks failed in the same step: go on."""


class Loaded(msgspec.Struct, tag=True, frozen=True):
    """The model is in memory."""


class Done(msgspec.Struct, tag=True, frozen=True):
    """What was to be answered is done."""


class Failed(msgspec.Struct, tag=True, frozen=True):
    """It is not."""

    message: str


Order = Begin | Meet | Fitted | Put | Run | RunUncached | Scrub | Copy | Resume
Answer = Loaded | Done | Failed

_encoder = msgspec.msgpack.Encoder()
_orders = msgspec.msgpack.Decoder(Order)
_answers = msgspec.msgpack.Decoder(Answer)


def encode(message: Order | Answer) -> bytes:
    return _encoder.encode(message)


def read_order(data: bytes | bytearray) -> Order:
    order: Order = _orders.decode(data)
    return order


def read_answer(data: bytes | bytearray) -> Answer:
    answer: Answer = _answers.decode(data)
    return answer


def pack(slot: int, weights: LoRAWeights) -> tuple[Put, list[memoryview]]:
    """An order, and the bytes that follow it."""
    dtype = next(iter(weights.pairs.values())).a.dtype
    pieces = [
        Piece(name, (pair.a.shape[0], pair.a.shape[1]), (pair.b.shape[0], pair.b.shape[1]))
        for name, pair in weights.pairs.items()
    ]
    key, of = weights.key, str(dtype).removeprefix("torch.")
    order = Put(slot, key.name, key.version, weights.rope_factor, of, pieces)
    tensors = itertools.chain.from_iterable(weights.pairs.values())
    return order, [one.contiguous().view(-1).view(torch.uint8).numpy().data for one in tensors]


def unpack(order: Put, data: bytearray, *, pin: bool) -> LoRAWeights:
    """What was packed; with `pin` in memory that a GPU reads by itself."""
    dtype: torch.dtype = getattr(torch, order.dtype)
    whole = torch.frombuffer(data, dtype=dtype)
    if pin:
        whole = whole.pin_memory()
    parts = iter(torch.split(whole, _sizes(order.pieces)))
    pairs = {
        piece.module: LoRAPair(next(parts).view(piece.a), next(parts).view(piece.b)) for piece in order.pieces
    }
    return LoRAWeights(AdapterKey(order.name, order.version), pairs, rope_factor=order.rope_factor)


def _sizes(pieces: Sequence[Piece]) -> list[int]:
    return [height * width for piece in pieces for height, width in (piece.a, piece.b)]
