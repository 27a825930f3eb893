"""Every way to apply LoRA to a mixed batch equals the plain loop over tokens."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from worker.engine import lora_layers
from worker.engine.adapters.adapter import LoRAPair, LoRAWeights
from worker.engine.lora_layers import LoRALayers, measure_costs
from worker.engine.lora_ops import add_lora_reference, choose_rows, weighted_sums
from worker.engine.lora_plan import Costs, Demand, Shape, Way, cheapest, merge_runs, seconds
from worker.engine.lora_table import Dimensions, Form, LoRATable, TokenEntries
from worker.engine.projections import Projection
from worker.jobs import AdapterKey

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
check = settings(max_examples=60, deadline=None)


def assert_close(got, expected):
    difference = (got.float() - expected).norm()
    assert difference <= TOLERANCE[got.dtype] * (1 + expected.norm())


@given(st.data())
@check
def test_weighted_sums_are_products_by_a_matrix_of_their_own(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    matrices, height, width = (data.draw(st.integers(1, high)) for high in (4, 9, 9))
    own = data.draw(st.lists(st.integers(0, matrices - 1), min_size=1, max_size=9))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    rows = torch.randn(matrices, height, width, generator=generator).to(dtype)
    x = torch.randn(len(own), height, generator=generator).to(dtype)
    chosen = torch.tensor(own)[:, None] * height + torch.arange(height)
    got = weighted_sums(rows.view(-1, width), choose_rows(chosen), x.view(-1))
    assert_close(
        got, torch.stack([one.float() @ rows[index].float() for one, index in zip(x, own, strict=True)])
    )


def test_a_token_is_computed_alike_beside_others():
    """Else a row's text would depend on its neighbours."""
    torch.manual_seed(0)
    table = LoRATable(Form(8, ((0, 1),)), [Dimensions(64, (32, 16))], 8, torch.float32)
    for entry in range(8):
        pairs = [LoRAPair(torch.randn(8, 64), torch.randn(out, 8)) for out in (32, 16)]
        table.write(entry, [pairs])
    x = torch.randn(16, 64)
    own = [token // 2 for token in range(16)]

    def outputs(tokens):
        y = torch.zeros(len(tokens), 48)
        runs = [(own[token], number, number + 1) for number, token in enumerate(tokens)]
        table.fields[0].add(x[tokens], y, TokenEntries(runs))
        return y

    together = outputs(range(16))
    assert all(torch.equal(outputs([token])[0], together[token]) for token in range(16))


def test_rows_far_into_a_table_are_found():
    """What 32 bits cannot number: a table of large adapters has as many."""
    far = torch.tensor([[2**31]])
    assert choose_rows(far).rows.tolist() == [2**31]
    assert choose_rows(far - 1).rows.dtype == torch.int32


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
        modules = draw(st.sets(st.sampled_from(["q", "k", "v", "o"])))
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
    return LoRALayers(projections, 8, costs or Costs())


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


def test_adapter_without_pairs_leaves_nothing_in_its_slot_and_an_unknown_slot_is_no_such(zeros):
    layers, _ = zeros
    layers.put(0, weights_of(1.0))
    layers.put(0, LoRAWeights(AdapterKey("a", "1"), {}))
    assert not layers._tables
    assert layers.plan([(0, 3), (0, 1)]) is None
    assert layers.place(0) == layers.place(None)
    layers.put(1, weights_of(2.0))
    assert output(zeros, 0, 1) == pytest.approx([0, 2])
    layers.put(0, weights_of(3.0))
    assert output(zeros, 0, 1) == pytest.approx([3, 2])
    for unknown in (layers.place, lambda slot: layers.plan([(slot, 1)])):
        with pytest.raises(KeyError):
            unknown(5)


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


def test_slot_that_could_not_be_filled_is_filled_before_it_is_used(zeros, monkeypatch):
    """Else the next step would take what another adapter left there for this one's weights."""
    layers, _ = zeros
    for slot, value in enumerate((1.0, 2.0)):
        layers.put(slot, weights_of(value))
    assert output(zeros, 0, 1) == pytest.approx([1, 2])

    def fail_after(write):
        def writes(*given):
            write(*given)
            raise MemoryError("no room")

        return writes

    with monkeypatch.context() as patch:
        patch.setattr(LoRATable, "write", fail_after(LoRATable.write))
        with pytest.raises(MemoryError):
            layers.put(0, weights_of(5.0))
    layers.put(2, weights_of(6.0))
    layers.put(0, weights_of(7.0))
    assert output(zeros, 0, 1, 2) == pytest.approx([7, 2, 6])


def test_places_of_adapters_that_left_are_used_again(zeros):
    layers, _ = zeros
    for round_ in range(30):
        for slot in range(4):
            layers.put((slot + round_) % 8, weights_of(float(slot + round_)))
            layers.clear((slot + round_ + 4) % 8)
    assert max(entry.number for entry in layers._entries.values()) < 8


def test_tables_that_nobody_uses_are_given_up(zeros):
    """Else every set of modules that was ever seen would keep its memory."""
    layers, _ = zeros
    for round_ in range(9):
        layers.put(0, weights_of(1.0, module="qkvo"[round_ % 4]))
        layers.put(1, weights_of(1.0, module="ok"[round_ % 2]))
        assert len(layers._tables) <= 2
    layers.clear(0)
    layers.clear(1)
    assert not layers._tables


def test_nothing_is_added_while_there_is_no_step(zeros):
    layers, model = zeros
    layers.put(0, weights_of(1.0))
    assert layers.plan([(None, 3), (None, 1)]) is None
    assert not model(torch.ones(1, 4, 6))[0].any()


# The choice


SHAPE = Shape(modules=2, features=3000)


def demand(adapters, each, rank=8):
    return Demand((each,) * adapters, (rank,) * adapters, tables=1)


def test_choice_follows_what_is_cheap():
    costs = Costs()
    assert cheapest(demand(1, 16), SHAPE, costs) is Way.SEGMENTS
    assert cheapest(demand(16, 1), SHAPE, costs) is Way.ROWS
    assert cheapest(demand(16, 1), SHAPE, costs._replace(sum_seconds=1e-7)) is Way.SEGMENTS
    assert cheapest(demand(4, 2), SHAPE, costs._replace(call_seconds=1e-3)) is Way.ROWS
    assert cheapest(demand(2, 32, rank=64), SHAPE._replace(features=30000), costs) is Way.SEGMENTS


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 64)), min_size=1, max_size=9),
    st.sampled_from(Way),
    st.integers(1, 5000),
)
def test_more_of_anything_never_costs_less(adapters, way, features):
    counts, ranks = zip(*adapters, strict=True)
    own = Demand(counts, ranks, 1)
    more = Demand((*counts, 2), (*ranks, 8), 1)
    shape = SHAPE._replace(features=features)
    assert 0 < seconds(way, own, shape, Costs()) <= seconds(way, more, shape, Costs())


def test_costs_can_be_measured():
    costs = measure_costs(torch.float32)
    assert all(0 <= cost < 1e-2 for cost in costs)
    assert costs.call_seconds > 0


def test_runs_are_of_tokens_that_follow_each_other():
    spans = [(1, 2), (1, 3), (None, 1), (2, 1), (None, 2), (2, 4)]
    assert merge_runs(spans, start=10) == [(1, 10, 15), (2, 16, 17), (2, 19, 23)]
