"""Every way to apply LoRA to a mixed batch equals the plain loop over tokens."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from torch import nn

from worker.engine import lora_layers
from worker.engine.adapter import LoRAPair, LoRAWeights
from worker.engine.lora_layers import LoRALayers, measure_costs
from worker.engine.lora_ops import (
    add_lora_packed,
    add_lora_reference,
    add_lora_segments,
    foreign_ranks,
    pack_stacks,
    stack_pairs,
)
from worker.engine.lora_plan import Costs, Demand, LaneBook, Way, cheapest, merge_runs, seconds
from worker.engine.projections import Projection
from worker.jobs import AdapterKey

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
check = settings(max_examples=60, deadline=None)


class Case(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor
    runs: list[tuple[int, int, int]]
    pairs: dict[int, LoRAPair]
    token_slots: list[int | None]


@st.composite
def cases(draw, dtypes=DTYPES):
    dtype = draw(st.sampled_from(dtypes))
    in_features, out_features = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    ranks = draw(st.dictionaries(st.integers(0, 5), st.integers(1, 6), max_size=5))
    lengths = st.tuples(st.sampled_from([None, *range(6)]), st.integers(1, 4))
    stretches = draw(st.lists(lengths, min_size=1, max_size=8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    runs, token_slots = [], []
    for slot, length in stretches:
        if slot is not None:
            runs.append((slot, len(token_slots), len(token_slots) + length))
        token_slots += [slot] * length
    pairs = {slot: LoRAPair(normal(r, in_features), normal(out_features, r)) for slot, r in ranks.items()}
    tokens = len(token_slots)
    return Case(normal(tokens, in_features), normal(tokens, out_features), runs, pairs, token_slots)


def assert_close(got, expected):
    difference = (got.float() - expected).norm()
    assert difference <= TOLERANCE[got.dtype] * (1 + expected.norm())


def stacks(case):
    """The adapters of a projection of one module."""
    return {slot: stack_pairs([pair], [len(pair.b)]) for slot, pair in case.pairs.items()}


def slots_of(case):
    return torch.tensor([-1 if slot is None else slot for slot in case.token_slots])


@given(cases())
@check
def test_segments_equal_the_plain_loop(case):
    expected = add_lora_reference(case.x, case.y, case.token_slots, case.pairs)
    add_lora_segments(case.x, case.y, case.runs, stacks(case))
    assert_close(case.y, expected)


@given(cases())
@check
def test_packed_equals_the_plain_loop(case):
    expected = add_lora_reference(case.x, case.y, case.token_slots, case.pairs)
    idle = [token for token, slot in enumerate(case.token_slots) if slot not in case.pairs]
    before = case.y[idle].clone()
    if case.pairs:
        packed = pack_stacks(stacks(case))
        add_lora_packed(case.x, case.y, packed.stack, foreign_ranks(slots_of(case), packed.slots))
    assert_close(case.y, expected)
    assert torch.equal(case.y[idle], before)


@given(cases())
@check
def test_mask_gives_each_token_the_columns_of_its_own_slot(case):
    columns = tuple(slot for slot, pair in case.pairs.items() for _ in range(pair.rank))
    mask = foreign_ranks(slots_of(case), columns)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[own != slot for slot in columns] for own in case.token_slots]


def test_stack_is_the_pairs_of_several_modules():
    torch.manual_seed(0)
    first, third = (LoRAPair(torch.randn(r, 5), torch.randn(out, r)) for r, out in ((2, 3), (4, 6)))
    stack = stack_pairs([first, None, third], [3, 2, 6])
    x, y = torch.randn(7, 5), torch.zeros(7, 11)
    add_lora_segments(x, y, [(9, 0, 7)], {9: stack})
    torch.testing.assert_close(y[:, :3], x @ first.a.T @ first.b.T)
    torch.testing.assert_close(y[:, 5:], x @ third.a.T @ third.b.T)
    assert not y[:, 3:5].any()


# A batch through projections: whichever way is taken, the result is the plain loop's.


class Model(nn.Module):
    """Two projections: one of three modules that share their input, one of one."""

    NAMES = (("q", "k", "v"), ("o",))

    def __init__(self, dtype):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 5), nn.Linear(6, 3, bias=False), nn.Linear(6, 4)
        self.o = nn.Linear(12, 6)
        self.to(dtype).requires_grad_(False)

    def forward(self, x):
        parts = torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)
        return parts, self.o(parts)


class Mixed(NamedTuple):
    spans: list[tuple[int | None, int]]
    weights: dict[int, LoRAWeights]


@st.composite
def mixes(draw):
    """Rows of slots and tokens, chunks first, and adapters of many ranks on some of the modules."""
    slots = st.sampled_from([None, *range(6)])
    chunks = draw(st.lists(st.tuples(slots, st.integers(2, 5)), max_size=4))
    decode = draw(st.lists(slots, max_size=9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    model = Model(torch.float32)
    weights = {}
    for slot in range(6):
        modules = draw(st.sets(st.sampled_from(["q", "k", "v", "o"]), min_size=1))
        pairs = {}
        for name in sorted(modules):
            rank, module = draw(st.sampled_from([1, 2, 7, 8, 9, 20])), getattr(model, name)
            pairs[name] = LoRAPair(
                torch.randn(rank, module.in_features, generator=generator),
                torch.randn(module.out_features, rank, generator=generator),
            )
        weights[slot] = LoRAWeights(AdapterKey(str(slot), "1"), pairs)
    return Mixed([*chunks, *((slot, 1) for slot in decode)], weights)


def layers_of(model, costs=None):
    projections = {
        names: Projection([getattr(model, name) for name in names], frozenset()) for names in Model.NAMES
    }
    return LoRALayers(projections, costs or Costs(), CPU)


def in_order(layers, spans):
    """As the runner sorts rows: chunks, then decoding rows by their place."""
    return sorted(spans, key=lambda span: (span[1] == 1, layers.place(span[0])))


def expected_of(model, x, token_slots, weights):
    """[T, 18] of the plain modules and the plain loop."""

    def module(name, x):
        linear = getattr(model, name)
        plain = nn.functional.linear(
            x.float(), linear.weight.float(), None if linear.bias is None else linear.bias.float()
        )
        pairs = {slot: own.pairs[name] for slot, own in weights.items() if name in own.pairs}
        return add_lora_reference(x, plain, token_slots, pairs)

    parts = torch.cat([module(name, x) for name in "qkv"], dim=-1)
    return torch.cat([parts, module("o", parts)], dim=-1)


@pytest.mark.parametrize("way", [*Way, None])
@given(mix=mixes(), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_every_way_equals_the_plain_loop(way, mix, seed):
    torch.manual_seed(seed)
    model = Model(torch.float32)
    plain = Model(torch.float32)
    plain.load_state_dict(model.state_dict())
    layers = layers_of(model)
    for slot, weights in mix.weights.items():
        layers.put(slot, weights)
    spans = in_order(layers, mix.spans)
    token_slots = [slot for slot, tokens in spans for _ in range(tokens)]
    x = torch.randn(1, len(token_slots), 6)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        if way is not None:
            patch.setattr(lora_layers, "cheapest", lambda *_: way)
        layers.step = layers.plan(spans)
        got = torch.cat(model(x), dim=-1)[0]
        layers.step = None
        base = torch.cat(model(x), dim=-1)[0]
    assert_close(got, expected_of(plain, x[0], token_slots, mix.weights))
    assert_close(base, expected_of(plain, x[0], [None] * len(token_slots), {}))


@pytest.mark.parametrize("way", Way)
@pytest.mark.parametrize(("base", "lora"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_adapters_of_another_type_than_the_base(way, base, lora, monkeypatch):
    """The product is made in the adapters' type; over bfloat16 nothing of it is lost before the sum."""
    monkeypatch.setattr(lora_layers, "cheapest", lambda *_: way)
    torch.manual_seed(0)
    base, lora = getattr(torch, base), getattr(torch, lora)
    model = Model(base)
    layers = layers_of(model)
    pairs = [LoRAPair(torch.randn(4, 6).to(lora), torch.randn(5, 4).to(lora)) for _ in range(3)]
    for slot, pair in enumerate(pairs):
        layers.put(slot, LoRAWeights(AdapterKey(str(slot), "1"), {"q": pair}))
    x = torch.randn(1, 6, 6).to(base)
    with torch.inference_mode():
        plain = model(x)[0][0, :, :5].clone()
        layers.step = layers.plan([(0, 2), (None, 1), (0, 1), (1, 1), (2, 1)])
        mixed = model(x)[0][0, :, :5]
    delta = add_lora_reference(x[0], torch.zeros_like(plain), [0, 0, None, 0, 1, 2], dict(enumerate(pairs)))
    assert mixed.dtype == base
    tolerance = 1e-2 if lora == torch.float32 else 5e-2
    torch.testing.assert_close(mixed.float(), plain.float() + delta, rtol=tolerance, atol=tolerance)


def weights_of(value, module="q"):
    width = {"q": 5, "k": 3, "v": 4, "o": 6}[module]
    depth = 12 if module == "o" else 6
    pair = LoRAPair(torch.full((1, depth), value), torch.ones(width, 1))
    return LoRAWeights(AdapterKey(f"{value}", "1"), {module: pair})


@pytest.fixture(params=Way)
def zeros(request, monkeypatch):
    monkeypatch.setattr(lora_layers, "cheapest", lambda *_: request.param)
    model = Model(torch.float32)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return layers_of(model), model


def output(zeros, *slots, column=0):
    layers, model = zeros
    layers.step = layers.plan([(slot, 1) for slot in slots])
    try:
        with torch.inference_mode():
            return model(torch.full((1, len(slots), 6), 1 / 6))[0][0, :, column].tolist()
    finally:
        layers.step = None


def test_slot_is_wholly_replaced_by_its_next_adapter(zeros):
    layers, _ = zeros
    layers.put(0, weights_of(1.0))
    layers.put(1, weights_of(2.0))
    assert output(zeros, 0, 0, 1, 1) == pytest.approx([1, 1, 2, 2])
    layers.put(0, weights_of(5.0, module="k"))
    assert output(zeros, 0, 0, 1, 1) == pytest.approx([0, 0, 2, 2])
    assert output(zeros, 0, 0, 1, 1, column=5) == pytest.approx([5, 5, 0, 0])
    layers.put(0, weights_of(3.0))
    assert output(zeros, 0, 0, 1, 1) == pytest.approx([3, 3, 2, 2])
    assert output(zeros, 0, 0, 1, 1, column=5) == pytest.approx([0, 0, 0, 0])
    layers.clear(1)
    layers.put(1, weights_of(7.0, module="v"))
    assert output(zeros, 0, 0, 1, 1) == pytest.approx([3, 3, 0, 0])


def test_adapter_that_overflows_leaves_its_neighbours_alone(zeros):
    layers, _ = zeros
    layers.put(0, weights_of(1.0))
    layers.put(
        1,
        LoRAWeights(
            AdapterKey("huge", "1"), {"q": LoRAPair(torch.full((1, 6), 3e38), torch.full((5, 1), 3e38))}
        ),
    )
    layers.put(2, weights_of(2.0))
    fine, huge, also_fine = output(zeros, 0, 1, 2)
    assert (fine, huge, also_fine) == (pytest.approx(1), torch.inf, pytest.approx(2))
    layers.put(1, weights_of(4.0))
    assert output(zeros, 0, 1, 2) == pytest.approx([1, 4, 2])


def test_lane_that_could_not_be_filled_is_filled_before_it_is_used(zeros, monkeypatch):
    """Else the next step would take what another adapter left there for this one's weights."""
    layers, _ = zeros
    for slot, value in enumerate((1.0, 2.0)):
        layers.put(slot, weights_of(value))
    assert output(zeros, 0, 1) == pytest.approx([1, 2])
    layers.put(0, weights_of(5.0))
    layers.put(1, weights_of(6.0))
    bank = layers._banks["q", "k", "v"]
    monkeypatch.setattr(bank, "fill_lane", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    if lora_layers.cheapest() is Way.LANES:
        with pytest.raises(MemoryError):
            output(zeros, 0, 1)
    monkeypatch.undo()
    monkeypatch.setattr(lora_layers, "cheapest", lambda *_: Way.LANES)
    assert output(zeros, 0, 1) == pytest.approx([5, 6])


def test_nothing_is_added_while_there_is_no_step(zeros):
    layers, model = zeros
    layers.put(0, weights_of(1.0))
    assert layers.plan([(None, 3), (None, 1)]) is None
    assert not model(torch.ones(1, 4, 6))[0].any()


# The choice


def demand(adapters, each, rank=8, lanes=None):
    lane_ranks = (adapters if lanes is None else lanes) * rank
    return Demand((each,) * adapters, (rank,) * adapters, lane_ranks, banks=1)


def test_choice_follows_what_is_cheap():
    costs = Costs()
    assert cheapest(demand(1, 16), 1500, costs) is Way.SEGMENTS
    assert cheapest(demand(2, 2), 1500, costs) is Way.PACKED
    assert cheapest(demand(16, 1), 1500, costs) is Way.LANES
    assert cheapest(demand(16, 1)._replace(banks=0), 1500, costs) is not Way.LANES
    assert cheapest(demand(4, 4, rank=256), 8000, costs._replace(multiply_seconds=1e-9)) is not Way.PACKED
    assert cheapest(demand(16, 1, lanes=400), 1500, costs) is not Way.LANES


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 64)), min_size=1, max_size=9),
    st.sampled_from(Way),
    st.integers(1, 5000),
)
def test_more_of_anything_never_costs_less(adapters, way, features):
    counts, ranks = zip(*adapters, strict=True)
    own = Demand(counts, ranks, sum(ranks), 1)
    more = Demand((*counts, 2), (*ranks, 8), sum(ranks) + 8, 1)
    assert 0 < seconds(way, own, features, Costs()) <= seconds(way, more, features, Costs())


def test_costs_can_be_measured():
    costs = measure_costs(CPU, torch.float32)
    assert all(0 <= cost < 1e-2 for cost in costs)
    assert costs.call_seconds > 0


def test_runs_are_of_tokens_that_follow_each_other():
    spans = [(1, 2), (1, 3), (None, 1), (2, 1), (None, 2), (2, 4)]
    assert merge_runs(spans, start=10) == [(1, 10, 15), (2, 16, 17), (2, 19, 23)]


class Lanes(RuleBasedStateMachine):
    """A bank that holds what it was told to put in each lane."""

    def __init__(self):
        super().__init__()
        self.book = LaneBook()
        self.version = dict.fromkeys(range(8), 0)
        self.bank = {}

    @rule(active=st.sets(st.integers(0, 7), min_size=1))
    def assign(self, active):
        reach = self.book.reach(active)
        held = {slot: self.book.lanes[slot] for slot in active if slot in self.book.lanes}
        for slot in self.book.assign(active):
            if slot in held:
                assert self.book.lanes[slot] < held.pop(slot), "a slot moves down or stays"
            self.bank[self.book.lanes[slot]] = (slot, self.version[slot])
        lanes = [self.book.lanes[slot] for slot in active]
        assert len(set(lanes)) == len(active)
        assert max(lanes) < reach
        assert all(self.book.lanes[slot] == lane for slot, lane in held.items())
        assert all(self.bank[self.book.lanes[slot]] == (slot, self.version[slot]) for slot in active)

    @rule(active=st.sets(st.integers(0, 7), min_size=1))
    def go_on(self, active):
        """Steps with the same adapters leave no gap between their lanes."""
        for _ in range(9):
            self.assign(active)
        assert {self.book.lanes[slot] for slot in active} == set(range(len(active)))

    @rule(slot=st.integers(0, 7))
    def replace(self, slot):
        self.version[slot] += 1
        self.book.forget(slot)

    @invariant()
    def what_is_in_the_book_is_in_the_bank(self):
        for slot, lane in self.book.lanes.items():
            assert self.bank[lane] == (slot, self.version[slot])


TestLanes = Lanes.TestCase
TestLanes.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
