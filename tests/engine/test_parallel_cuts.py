"""What ranks have of a module and of an adapter makes the whole again; the channel that brings it there."""

import socket
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from worker.engine.adapters.adapter import LoRAPair, LoRAWeights
from worker.engine.cuts import Cut, Rank, Side, cut_module, cut_pair
from worker.engine.executor import PackedRow
from worker.engine.kernels.tilings import Fit, Work, default_tiling
from worker.engine.kv_cache import BlockCopy, Leftover
from worker.engine.lora_plan import Costs
from worker.engine.parallel import orders
from worker.engine.parallel.channel import Channel, Gone
from worker.engine.parallel.share import Share
from worker.jobs import AdapterKey

WORK = Work(64, (64, 32), 8, 16, 4)


def ranks(degree):
    return [Rank(number, degree) for number in range(degree)]


@given(size=st.integers(0, 1000), degree=st.integers(1, 64))
def test_parts_are_the_whole_and_nearly_equal(size, degree):
    parts = [rank.part(size) for rank in ranks(degree)]
    assert [number for part in parts for number in range(part.start, part.stop)] == list(range(size))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1


def linear(kind, into, out, bias):
    module = Conv1D(out, into) if kind is Conv1D else nn.Linear(into, out, bias=bias)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("side", Side)
def test_what_the_ranks_make_of_x_is_what_the_module_makes(kind, degree, bias, side):
    torch.manual_seed(0)
    x = torch.randn(5, 12)
    module = linear(kind, 12, 18, bias)
    expected, state = module(x), module.state_dict()
    ys = []
    for rank in ranks(degree):
        own = linear(kind, 12, 18, bias)
        own.load_state_dict(state)
        cut_module(own, Cut(side), rank)
        ys.append(own(x[:, rank.part(12)] if side is Side.IN else x))
        assert own.weight.untyped_storage().nbytes() == 12 * 18 * 4 // degree
        if kind is nn.Linear:
            assert (own.out_features, own.in_features) == tuple(own.weight.shape)
        else:
            assert (own.nx, own.nf) == tuple(own.weight.shape)
    whole = torch.stack(ys).sum(0) if side is Side.IN else torch.cat(ys, dim=1)
    torch.testing.assert_close(whole, expected)


@settings(max_examples=60, deadline=None)
@given(
    r=st.integers(1, 20),
    degree=st.integers(2, 5),
    into=st.integers(5, 30),
    out=st.integers(5, 30),
    side=st.sampled_from(Side),
    fully=st.booleans(),
)
def test_what_the_ranks_add_for_an_adapter_is_what_it_adds(r, degree, into, out, side, fully):
    torch.manual_seed(r)
    whole = LoRAPair(torch.randn(r, into), torch.randn(out, r))
    x = torch.randn(4, into)
    pairs = [cut_pair(whole, Cut(side), rank, fully=fully) for rank in ranks(degree)]
    xs = [x[:, rank.part(into)] if side is Side.IN else x for rank in ranks(degree)]
    hs = [own @ pair.a.T for own, pair in zip(xs, pairs, strict=True)]
    if fully:
        h = sum(hs) if side is Side.IN else torch.cat(hs, dim=1)
        hs = [h] * degree
        assert len({pair.rank for pair in pairs}) == 1
    ys = [h @ pair.b.T for h, pair in zip(hs, pairs, strict=True)]
    y = torch.cat(ys, dim=1) if fully or side is Side.OUT else sum(ys)
    torch.testing.assert_close(y, x @ whole.a.T @ whole.b.T, rtol=1e-3, atol=1e-3)
    assert cut_pair(whole, None, Rank(0, degree), fully=fully) is whole


# Messages


@pytest.fixture
def ends():
    left, right = socket.socketpair()
    pair = Channel(left, 0.2), Channel(right, 0.2)
    yield pair
    for channel in pair:
        channel.close()


def test_messages_come_whole_whatever_their_size(ends):
    sent = [b"", b"x", bytes(range(256)) * 40_000]

    def send():
        for message in sent:
            ends[0].send(message[:100], memoryview(message)[100:])

    thread = threading.Thread(target=send)
    thread.start()
    assert [bytes(ends[1].receive(None)) for _ in sent] == sent
    thread.join()


def test_a_side_that_has_closed_or_stands_still_is_gone(ends):
    with pytest.raises(Gone, match="does not answer"):
        ends[1].receive(0.01)
    with pytest.raises(Gone, match="takes no messages"):
        ends[0].send(bytes(64 << 20))  # nobody reads
    with pytest.raises(Gone, match="does not answer"):
        ends[1].receive(None)  # what came is not whole
    ends[0].close()
    with pytest.raises(Gone):
        ends[0].receive(1)
    with pytest.raises(Gone):
        ends[1].send(b"x")


def test_a_side_that_closes_in_a_message_is_gone(ends):
    ends[0]._socket.sendall(b"\x10\x00\x00\x00\x00\x00\x00\x00half")
    ends[0].close()
    with pytest.raises(Gone, match="has closed"):
        ends[1].receive(None)
    with pytest.raises(Gone, match="has closed"):
        ends[1].receive(None)


@pytest.mark.parametrize(
    "order",
    [
        orders.Run([PackedRow([3, 1], 5, [7], 1, 2, 0), PackedRow([4], 0, [1, 2, 3], 3)], 6),
        orders.RunUncached([[1, 2], [3, 4, 5]]),
        orders.Scrub([Leftover(1, 0, 16)]),
        orders.Copy([BlockCopy(1, 2, 16)]),
        orders.Resume(),
        orders.Meet(Costs(1e-6, 2e-10, 3e-11, 4e-10)),
        orders.Fitted.of(Fit({WORK: default_tiling(WORK)}, 9)),
    ],
)
def test_an_order_is_read_as_it_was_given(order):
    assert orders.read_order(orders.encode(order)) == order
    if isinstance(order, orders.Fitted):
        assert orders.Fitted.of(order.fit) == order
        assert isinstance(next(iter(order.fit.tilings)), Work)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_adapter_arrives_as_it_was_cut(dtype):
    pairs = {
        "a": LoRAPair(torch.randn(3, 8).to(dtype)[:, 2:5], torch.randn(6, 3).to(dtype)),
        "b": LoRAPair(torch.randn(1, 4).to(dtype), torch.randn(5, 1).to(dtype)),
    }
    order, parts = orders.pack(4, LoRAWeights(AdapterKey("x", "1"), pairs, rope_factor=2.5))
    data = bytearray().join(parts)
    got = orders.unpack(orders.read_order(orders.encode(order)), data, pin=False)
    assert (got.key, got.rope_factor) == (AdapterKey("x", "1"), 2.5)
    assert order.slot == 4
    for name, pair in pairs.items():
        for mine, theirs in zip(pair, got.pairs[name], strict=True):
            assert theirs.dtype == dtype
            assert torch.equal(mine, theirs)


def test_modules_with_one_input_stay_together_only_where_one_exchange_serves_them():
    share = Share(Rank(0, 2), fully_sharded=True)
    out, inside = Cut(Side.OUT), Cut(Side.OUT, inside=True)
    share._cuts = {"q": out, "k": out, "a": Cut(Side.IN), "b": Cut(Side.IN), "c": inside, "d": inside}
    groups = share.divide(["q", "a", "k", "whole", "b", "c", "own", "d"])
    assert groups == [("q", "k"), ("a",), ("whole", "own"), ("b",), ("c",), ("d",)]
