"""What the Triton kernels promise, against plain loops in float32.

On a CUDA device, or with TRITON_INTERPRET=1 on the CPU: `test_kernels.py` runs this file in that way.
"""
# ruff: noqa: E402 (nothing here can be imported without Triton)

import os
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from worker.engine.adapters.adapter import LoRAPair
from worker.engine.kernels import attention
from worker.engine.kernels.attention import paged_decode, paged_prefill
from worker.engine.kernels.lora import LoRATable, TokenTiles, add_lora, scratch_size, tile_tokens
from worker.engine.kernels.tilings import Situation, default_tiling, expands_to_try, shrinks_to_try
from worker.engine.kernels.trial import Trial
from worker.engine.kernels.tuning import CudaTimer, Timer, TimingTuner
from worker.engine.lora_ops import add_lora_reference, add_stack

pytestmark = pytest.mark.gpu
on_cuda = pytest.mark.skipif(INTERPRETED, reason="needs a real device")

DEVICE = "cpu" if INTERPRETED else "cuda"
# Triton's interpreter cannot multiply bfloat16 matrices: it gives garbage, without a word.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# Each new shape is compiled, and the interpreter is slow: few examples, and a failing one is not shrunk.
check = settings(
    max_examples=10,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
nan = float("nan")


def assert_close(got, expected):
    assert got.isfinite().all()
    difference = (got.float().cpu() - expected.float().cpu()).norm()
    assert difference <= TOLERANCE[got.dtype] * (1 + expected.norm())


def random_tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape, dtype=torch.float32: torch.randn(shape, generator=generator).to(DEVICE, dtype)


# LoRA


class LoRACase(NamedTuple):
    """A projection group, its adapters by slot, and a step. Beyond the step's T tokens nothing is used."""

    x: torch.Tensor
    y: torch.Tensor
    table: LoRATable
    pairs: dict[int, list[LoRAPair | None]]
    runs: list[tuple[int, int, int]]
    max_tokens: int

    @property
    def token_slots(self):
        slots = [None] * len(self.x)
        for slot, start, stop in self.runs:
            slots[start:stop] = [slot] * (stop - start)
        return slots

    @property
    def idle(self):
        return [token for token, slot in enumerate(self.token_slots) if slot not in self.pairs]

    def run(self, x=None, y=None, runs=None):
        x, y = self.x if x is None else x, (self.y if y is None else y).clone()
        tokens = TokenTiles(self.max_tokens, len(self.table.rows), DEVICE)
        tokens.copy_(tile_tokens(self.runs if runs is None else runs, self.max_tokens, len(self.table.rows)))
        add_lora(x, y, self.table, tokens, scratch_for(self.table, self.max_tokens))
        return y

    def expected(self):
        result, first = self.y.float().cpu().clone(), 0
        for member, out in enumerate(self.table.out_features):
            own = {
                slot: LoRAPair(*(tensor.cpu() for tensor in pairs[member]))
                for slot, pairs in self.pairs.items()
                if pairs[member] is not None
            }
            columns = slice(first, first + out)
            result[:, columns] = add_lora_reference(self.x.cpu(), result[:, columns], self.token_slots, own)
            first += out
        return result


def scratch_for(table, max_tokens, dtype=torch.float32):
    return torch.full((scratch_size(table, max_tokens, dtype),), nan, device=DEVICE)


SLOTS = 5


@st.composite
def lora_cases(draw):
    normal = random_tensors(draw(st.integers(0, 2**31)))
    dtype, lora_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    in_features = draw(st.sampled_from([1, 7, 16, 40, 130, 1100]))
    out_features = draw(st.lists(st.sampled_from([1, 8, 16, 33, 144]), min_size=1, max_size=3))
    rank = st.none() | st.sampled_from([1, 3, 8, 13, 16, 40])
    table = LoRATable(SLOTS, in_features, out_features, max_rank=40, dtype=lora_dtype, device=DEVICE)
    ranks = draw(st.dictionaries(st.integers(0, SLOTS - 1), st.tuples(*[rank] * len(out_features))))
    pairs = {}
    for slot, own in ranks.items():
        pairs[slot] = [
            None
            if r is None
            else LoRAPair(
                normal(r, in_features, dtype=lora_dtype) / in_features**0.5,
                normal(out, r, dtype=lora_dtype) / r**0.5,
            )
            for out, r in zip(out_features, own, strict=True)
        ]
        table.put(slot, pairs[slot])
    stretch = st.tuples(st.sampled_from([None, *range(SLOTS)]), st.sampled_from([1, 2, 5, 17, 70]))
    runs, tokens = [], 0
    for slot, length in draw(st.lists(stretch, min_size=1, max_size=6)):
        if slot is not None:
            runs.append((slot, tokens, tokens + length))
        tokens += length
    max_tokens = draw(st.sampled_from([tokens, tokens + 3, 256 + tokens]))
    x, y = normal(tokens, in_features, dtype=dtype), normal(tokens, sum(out_features), dtype=dtype)
    return LoRACase(x, y, table, pairs, runs, max_tokens)


@given(lora_cases())
@check
def test_lora_equals_the_plain_loop_and_leaves_other_tokens_alone(case):
    y = case.run()
    assert_close(y, case.expected())
    assert torch.equal(y[case.idle], case.y[case.idle])


@given(lora_cases())
@check
def test_token_gets_the_same_alone_and_in_the_batch(case):
    together = case.run()
    for token, slot in enumerate(case.token_slots):
        if slot in case.pairs:
            alone = case.run(runs=[(slot, token, token + 1)])
            assert torch.equal(alone[token], together[token])
            break


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@given(lora_cases(), st.integers(0, SLOTS - 1), st.sampled_from([nan, torch.inf]))
@check
def test_broken_adapter_and_broken_token_reach_nobody_else(case, broken, value):
    expected = case.run()
    sound = [token for token, slot in enumerate(case.token_slots) if slot != broken]
    if case.pairs.get(broken):
        case.table.put(
            broken, [pair and LoRAPair(pair.a * value, pair.b * value) for pair in case.pairs[broken]]
        )
    assert torch.equal(case.run()[sound], expected[sound])
    x = case.x.clone()
    x[0] = value
    assert torch.equal(case.run(x=x)[sound][1:], expected[sound][1:])


@pytest.mark.parametrize("max_tokens", [40, 400])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_reads_and_writes_strided_views_and_nothing_beside_them(dtype, max_tokens):
    normal, size = random_tensors(3), 1600  # features enough for the sum over them to be split
    table = LoRATable(4, size, [32, 16], max_rank=16, dtype=dtype, device=DEVICE)
    pairs = {}
    for slot in (0, 3):
        pair = LoRAPair(normal(16, size, dtype=dtype) / size**0.5, normal(32, 16, dtype=dtype))
        pairs[slot] = [pair, None]
        table.put(slot, pairs[slot])
    wide_x, wide_y = normal(30, size + 9, dtype=dtype), normal(30, 70, dtype=dtype)
    before = wide_y.clone()
    x, y = wide_x[:, 3 : size + 3], wide_y[:, 16:64]
    case = LoRACase(x, y, table, pairs, [(3, 0, 11), (0, 11, 30)], max_tokens)
    expected = case.expected()
    tokens = TokenTiles(max_tokens, 4, DEVICE)
    tokens.copy_(tile_tokens(case.runs, max_tokens, 4))
    add_lora(case.x, case.y, table, tokens, scratch_for(table, max_tokens))
    assert_close(case.y, expected)
    assert torch.equal(wide_y[:, 48:], before[:, 48:])
    assert torch.equal(wide_y[:, :16], before[:, :16])


def every_tiling(work):
    """What a tuner may choose: changes to shrink, then to expand."""
    shrinks = shrinks_to_try(work)
    return [*shrinks, *expands_to_try(shrinks[-1])[1:]]


@pytest.mark.parametrize("max_tokens", [48, 400])
def test_lora_is_the_same_however_it_is_cut(max_tokens):
    normal, size = random_tensors(8), 1100
    table = LoRATable(3, size, [48, 33], max_rank=40, dtype=torch.float32, device=DEVICE)
    pairs = {
        slot: [
            LoRAPair(normal(r, size) / size**0.5, normal(48, r)),
            None if r == 3 else LoRAPair(normal(r, size) / size**0.5, normal(33, r)),
        ]
        for slot, r in ((0, 40), (1, 3), (2, 16))
    }
    for slot, own in pairs.items():
        table.put(slot, own)
    x, y = normal(42, size), normal(42, 81)
    case = LoRACase(x, y, table, pairs, [(2, 0, 5), (0, 5, 38), (1, 40, 42)], max_tokens)
    expected = case.expected()
    tilings = every_tiling(table.work(max_tokens, torch.float32))
    assert len(set(tilings)) == len(tilings) >= 10
    if INTERPRETED:  # which knows no warps and stages
        tilings = {(one.splits, one.ranks, one.features, one.columns): one for one in tilings}.values()
        assert len(tilings) >= 5
    for tiling in tilings:
        table.set_tiling(table.work(max_tokens, torch.float32), tiling)
        assert_close(case.run(), expected)


def test_products_are_the_kernels_equal():
    normal = random_tensors(9)
    table = LoRATable(2, 40, [16, 8, 24], max_rank=16, dtype=torch.float32, device=DEVICE)
    own = [LoRAPair(normal(5, 40), normal(16, 5)), None, LoRAPair(normal(16, 40), normal(24, 16))]
    table.put(1, own)
    x, y = normal(20, 40) / 40**0.5, normal(20, 48)
    by_products = y.clone()
    add_stack(x[3:], by_products[3:], table.stack(1))
    assert_close(by_products, LoRACase(x, y, table, {1: own}, [(1, 3, 20)], 20).expected())
    assert table.stack(0) is None


SITUATION = Situation(
    [(64, (64, 32)), (128, (64,)), (64, (64, 32))],
    decode_tokens=8,
    chunk_tokens=320,
    max_loras=4,
    max_rank=16,
    lora_dtype=torch.float16,
    dtype=torch.float16,
    device=torch.device(DEVICE),
)


@on_cuda
def test_device_is_timed_once(tmp_path):
    class Never(Timer):
        def replayed(self, launch):
            raise AssertionError("known already")

        launched = replayed

    file = tmp_path / "kernels" / "this.json"
    fit = TimingTuner(CudaTimer(), 120, file).tune(SITUATION)
    assert len(fit.tilings) == 4
    assert TimingTuner(Never(), 120, file).tune(SITUATION) == fit


@pytest.mark.parametrize("tokens", [SITUATION.decode_tokens, SITUATION.chunk_tokens])
def test_trial_does_what_a_step_does(tokens):
    trial = Trial(SITUATION.projections[0], tokens, SITUATION)
    tiling = default_tiling(trial.work)
    launches = [trial.kernels(tiling), trial.kernels(tiling, [(0, 0, tokens)]), trial.products(tokens)]
    changes = []
    for launch in launches:
        before = trial.y.clone()
        launch()
        changes.append(trial.y - before)
        assert changes[-1].isfinite().all()
        assert changes[-1].any(dim=1).all(), "a token without an adapter"
    assert_close(changes[1], changes[2])
    idle = trial.y.clone()
    trial.kernels(tiling, [(0, 0, 0)])()
    assert torch.equal(trial.y, idle)


def one_pair(value, rank=1, out=2, dtype=torch.float32):
    a = torch.full((rank, 2), value, dtype=dtype, device=DEVICE)
    return LoRAPair(a, torch.ones(out, rank, dtype=dtype, device=DEVICE))


def test_slot_is_wholly_replaced_and_the_addresses_stay():
    table = LoRATable(2, 2, [2, 2], max_rank=9, dtype=torch.float32, device=DEVICE)
    tokens, scratch = TokenTiles(3, 2, DEVICE), scratch_for(table, 3)
    addresses = [tensor.data_ptr() for tensor in (table.rows, tokens.buffer)]

    def outputs(*slots):
        y = torch.zeros(len(slots), 4, device=DEVICE)
        tokens.copy_(tile_tokens([(slot, token, token + 1) for token, slot in enumerate(slots)], 3, 2))
        add_lora(torch.ones(len(slots), 2, device=DEVICE), y, table, tokens, scratch)
        return y[:, [0, 3]].tolist()

    assert outputs(0, 1, 0) == [[0, 0]] * 3
    table.put(0, [one_pair(1.0), one_pair(2.0, rank=9)])
    table.put(1, [None, one_pair(3.0)])
    assert outputs(0, 1, 0) == [[2, 36], [0, 6], [2, 36]]
    table.put(0, [one_pair(5.0), None])
    assert outputs(0, 1, 0) == [[10, 0], [0, 6], [10, 0]]
    table.clear(1)
    assert outputs(0, 1, 0) == [[10, 0], [0, 0], [10, 0]]
    table.put(0, [None, None])
    assert outputs(1, 0) == [[0, 0]] * 2
    assert addresses == [tensor.data_ptr() for tensor in (table.rows, tokens.buffer)]


def test_weights_of_a_rank_that_is_a_multiple_of_eight_are_not_copied():
    table = LoRATable(1, 2, [2], max_rank=8, dtype=torch.float32, device=DEVICE)
    pair = one_pair(1.0, rank=8)
    table.put(0, [pair])
    assert table.rows[0].tolist() == [pair.a.data_ptr(), 8, pair.b.data_ptr(), 8, 0]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 90)), max_size=8), st.sampled_from([0, 5, 300]))
@settings(deadline=None)
def test_tiles_hold_every_token_once_with_its_slot(stretches, spare):
    runs, tokens, expected = [], 0, {}
    for slot, length in stretches:
        runs.append((slot, tokens, tokens + length))
        expected.update(dict.fromkeys(range(tokens, tokens + length), slot))
        tokens += length + 1
    tiles = tile_tokens(runs, tokens + spare, 7)
    columns = [column.tolist() for column in (tiles.slots, tiles.starts, tiles.stops)]
    assert all(len(column) == tiles.max_tiles for column in columns)
    found = []
    for slot, start, stop in zip(*columns, strict=True):
        assert 0 <= stop - start <= tiles.tile_size
        found += [(token, slot) for token in tiles.order[start:stop].tolist()]
    assert sorted(found) == sorted(expected.items())


@on_cuda
def test_captured_lora_follows_new_adapters_and_new_tokens():
    normal = random_tensors(5)
    table = LoRATable(4, 256, [128, 64], max_rank=16, dtype=torch.bfloat16, device=DEVICE)
    tokens, scratch = TokenTiles(32, 4, DEVICE), scratch_for(table, 32)
    x, y = (normal(32, size, dtype=torch.bfloat16) for size in (256, 192))
    start = y.clone()
    add_lora(x, y, table, tokens, scratch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y.copy_(start)
        add_lora(x, y, table, tokens, scratch)
    for step in range(3):
        pairs = {
            slot: [
                LoRAPair(normal(r, 256, dtype=torch.bfloat16) / 16, normal(o, r, dtype=torch.bfloat16))
                for o in (128, 64)
            ]
            for slot, r in ((step, 8), (3, 16))
        }
        for slot, own in pairs.items():
            table.put(slot, own)
        runs = [(step, 0, 5 + step), (3, 20, 30)]
        tokens.copy_(tile_tokens(runs, 32, 4))
        graph.replay()
        case = LoRACase(x, start, table, pairs, runs, 32)
        assert_close(y, case.expected())
        assert torch.equal(y[case.idle], start[case.idle])


# Attention


class Shape(NamedTuple):
    kv_heads: int
    group: int
    key_dim: int
    value_dim: int
    page: int
    window: int | None
    softcap: float | None
    dtype: torch.dtype


@st.composite
def shapes(draw):
    key_dim = draw(st.sampled_from([16, 24, 64, 80]))
    return Shape(
        kv_heads=draw(st.sampled_from([1, 1, 2])),
        group=draw(st.sampled_from([1, 3, 4, 8])),
        key_dim=key_dim,
        value_dim=draw(st.sampled_from([key_dim, 16, 40])),
        page=draw(st.sampled_from([8, 16, 32, 11])),
        window=draw(st.sampled_from([None, None, 1, 7, 33, 90])),
        softcap=draw(st.sampled_from([None, None, 2.0, 30.0])),
        dtype=draw(st.sampled_from(DTYPES)),
    )


class Cache:
    """A paged cache where all that a row may not look at is NaN, or an address far outside.

    `spans[row]` is the range of positions that row may look at.
    """

    def __init__(self, shape, spans, seed, spare_blocks=3):
        self.shape = shape
        normal = random_tensors(seed)
        generator = torch.Generator().manual_seed(seed)
        page, longest = shape.page, max((span.stop for span in spans), default=0)
        width = -(-longest // page) + spare_blocks
        blocks = [range(span.start // page, -(-span.stop // page)) if span else range(0) for span in spans]
        numbers = torch.randperm(sum(map(len, blocks)) + spare_blocks, generator=generator).tolist()
        sizes = (len(numbers), page, shape.kv_heads)
        self.keys, self.values = (
            torch.full((*sizes, dim), nan, dtype=shape.dtype, device=DEVICE)
            for dim in (shape.key_dim, shape.value_dim)
        )
        table = torch.full((len(spans), width), 2**30, dtype=torch.int32)
        self.rows = []
        for row, span in enumerate(spans):
            own = [
                normal(len(span), shape.kv_heads, dim, dtype=shape.dtype)
                for dim in (shape.key_dim, shape.value_dim)
            ]
            self.rows.append((span, *(tensor.float().cpu() for tensor in own)))
            for block in blocks[row]:
                table[row, block] = number = numbers.pop()
                held = range(max(span.start, block * page), min(span.stop, block * page + page))
                inside = slice(held.start - block * page, held.stop - block * page)
                for cache, tensor in zip((self.keys, self.values), own, strict=True):
                    cache[number, inside] = tensor[held.start - span.start : held.stop - span.start]
        self.table = table.to(DEVICE)

    def attend(self, row, query, position, scale):
        """The plain loop: one token [H, D] at `position` -> [H, Dv], in float32."""
        span, keys, values = self.rows[row]
        first = 0 if self.shape.window is None else max(0, position - self.shape.window + 1)
        seen = slice(first - span.start, position + 1 - span.start)
        result = []
        for head, vector in enumerate(query.float().cpu()):
            kv_head = head // self.shape.group
            scores = keys[seen, kv_head] @ vector * scale
            if self.shape.softcap is not None:
                scores = self.shape.softcap * torch.tanh(scores / self.shape.softcap)
            result.append(torch.softmax(scores, 0) @ values[seen, kv_head])
        return torch.stack(result)

    @property
    def settings(self):
        return {"scale": 0.3, "softcap": self.shape.softcap, "window": self.shape.window}


def int32(numbers):
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def span_of(shape, first_query, stop):
    """What the tokens from `first_query` to `stop` may look at."""
    return range(0 if shape.window is None else max(0, first_query - shape.window + 1), stop)


def decode(cache, query, lengths, rows=slice(None)):
    out = torch.full((*query.shape[:2], cache.shape.value_dim), nan, dtype=query.dtype, device=DEVICE)
    paged_decode(
        query[rows], cache.keys, cache.values, cache.table[rows], int32(lengths)[rows], **cache.settings,
        out=out[rows],
    )  # fmt: skip
    return out[rows]


def assert_decodes(shape, lengths, seed):
    cache = Cache(
        shape, [span_of(shape, length - 1, length) if length else range(0) for length in lengths], seed
    )
    query = random_tensors(seed + 1)(
        len(lengths), shape.kv_heads * shape.group, shape.key_dim, dtype=shape.dtype
    )
    out = decode(cache, query, lengths)
    expected = torch.stack(
        [
            cache.attend(row, query[row], length - 1, 0.3) if length else torch.zeros(out.shape[1:])
            for row, length in enumerate(lengths)
        ]
    )
    assert_close(out, expected)
    assert not out[[row for row, length in enumerate(lengths) if not length]].any()
    return cache, query, out


lengths = st.lists(st.sampled_from([0, 1, 7, 8, 31, 32, 33, 64, 65, 100]), min_size=1, max_size=3)


@given(shapes(), lengths, st.integers(0, 2**31))
@check
def test_decode_equals_the_plain_loop(shape, lengths, seed):
    assert_decodes(shape, lengths, seed)


@given(shapes(), lengths.filter(any), st.integers(0, 2**31), st.sampled_from([1, 5000]))
@check
def test_decode_in_many_splits_equals_the_plain_loop_and_knows_no_neighbours(shape, lengths, seed, enough):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(attention, "_SPLIT", 32)
        monkeypatch.setattr(attention, "_ENOUGH_PROGRAMS", enough)
        cache, query, together = assert_decodes(shape, lengths, seed)
        row = lengths.index(max(lengths))
        assert torch.equal(decode(cache, query, lengths, slice(row, row + 1))[0], together[row])


@pytest.mark.parametrize("window", [None, 700])
def test_long_rows_are_split(window):
    shape = Shape(1, 4, 64, 64, 16, window, None, DTYPES[-1])
    assert_decodes(shape, [1500, 3, 0, 1024, 513], seed=7)


def prefill(cache, query, counts, offsets, rows):
    """Rows `rows` of the chunks that lie one after the other in `query`."""
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    own = torch.cat([query[starts[row] : starts[row + 1]] for row in rows])
    out = torch.full((*own.shape[:2], cache.shape.value_dim), nan, dtype=query.dtype, device=DEVICE)
    ends = torch.tensor([0, *(counts[row] for row in rows)]).cumsum(0).tolist()
    paged_prefill(
        own, cache.keys, cache.values, cache.table[rows], int32(ends), int32([offsets[row] for row in rows]),
        **cache.settings, out=out,
    )  # fmt: skip
    return out


def assert_prefills(shape, chunks, seed):
    """`chunks` lists (tokens cached before, tokens in the chunk)."""
    offsets, counts = zip(*chunks, strict=True)
    spans = [span_of(shape, offset, offset + count) if count else range(0) for offset, count in chunks]
    cache = Cache(shape, spans, seed)
    query = random_tensors(seed + 1)(
        sum(counts), shape.kv_heads * shape.group, shape.key_dim, dtype=shape.dtype
    )
    out = prefill(cache, query, counts, offsets, range(len(chunks)))
    tokens = [(row, offset + number) for row, (offset, count) in enumerate(chunks) for number in range(count)]
    expected = torch.stack([cache.attend(row, query[t], p, 0.3) for t, (row, p) in enumerate(tokens)])
    assert_close(out, expected)
    return cache, query, out


chunk = st.tuples(st.sampled_from([0, 1, 8, 40, 63]), st.sampled_from([0, 1, 2, 8, 17, 50]))
some_chunks = st.lists(chunk, min_size=1, max_size=3).filter(lambda drawn: any(count for _, count in drawn))


@given(shapes(), some_chunks, st.integers(0, 2**31))
@check
def test_prefill_equals_the_plain_loop_and_knows_no_neighbours(shape, chunks, seed):
    cache, query, together = assert_prefills(shape, chunks, seed)
    offsets, counts = zip(*chunks, strict=True)
    row = max(range(len(chunks)), key=lambda row: counts[row])
    start = sum(counts[:row])
    alone = prefill(cache, query, counts, offsets, [row])
    assert torch.equal(alone, together[start : start + counts[row]])


def test_many_rows_of_few_tokens_find_their_own_tiles():
    shape = Shape(1, 8, 16, 16, 8, None, None, DTYPES[-1])
    assert_prefills(shape, [(row % 5, row * 7 % 23) for row in range(12)], seed=11)


def test_chunk_gets_what_the_whole_prompt_gets():
    shape = Shape(1, 4, 64, 64, 16, None, None, DTYPES[-1])
    cache, query, whole = assert_prefills(shape, [(0, 90)], seed=13)
    edges = [(0, 1), (1, 40), (40, 90)]
    parts = [prefill(cache, query[start:stop], [stop - start], [start], [0]) for start, stop in edges]
    assert_close(torch.cat(parts), whole)


def test_row_whose_own_values_are_not_finite_says_so():
    shape = Shape(1, 2, 16, 16, 8, None, None, torch.float32)
    cache = Cache(shape, [range(20), range(20)], seed=17)
    cache.values[cache.table[0, 1].item()] = nan
    out = decode(cache, random_tensors(1)(2, 2, 16), [20, 20])
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


def test_query_and_output_may_be_views():
    shape = Shape(2, 3, 24, 24, 8, None, None, torch.float32)
    cache = Cache(shape, [range(20)] * 2, seed=19)
    wide = random_tensors(1)(2, 10, 30)
    query, out = wide[:, 2:8, 3:27], torch.full((2, 9, 40), 5.0, device=DEVICE)
    paged_decode(
        query, cache.keys, cache.values, cache.table, int32([20, 20]), **cache.settings, out=out[:, 1:7, 8:32]
    )
    expected = torch.stack([cache.attend(row, query[row], 19, 0.3) for row in range(2)])
    assert_close(out[:, 1:7, 8:32].contiguous(), expected)
    out[:, 1:7, 8:32] = 5.0
    assert (out == 5.0).all()


@on_cuda
def test_captured_decode_follows_new_lengths_and_blocks():
    shape = Shape(2, 4, 128, 128, 16, None, None, torch.bfloat16)
    tokens = random_tensors(23)
    cache = Cache(shape, [range(900), range(1500), range(40)], seed=23)
    query = tokens(3, 8, 128, dtype=torch.bfloat16)
    table, held, out = cache.table.clone(), int32([0, 0, 0]), torch.empty_like(query)

    def attend():
        paged_decode(query, cache.keys, cache.values, table, held, **cache.settings, out=out)

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend()
    for rows, lengths in (((0, 1, 2), (900, 1500, 40)), ((2, 0, 1), (17, 0, 1024))):
        table.copy_(cache.table[list(rows)])
        held.copy_(int32(lengths))
        graph.replay()
        for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            if length:
                assert_close(out[place], cache.attend(row, query[place], length - 1, 0.3))
            else:
                assert not out[place].any()
