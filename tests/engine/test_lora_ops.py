"""Every way to apply LoRA to a mixed batch equals the plain loop over tokens."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from worker.engine import lora_layers
from worker.engine.adapter import LoRAPair, LoRAWeights
from worker.engine.lora_layers import LoRALayers, LoRAPlan
from worker.engine.lora_ops import (
    add_lora_packed,
    add_lora_reference,
    add_lora_segments,
    foreign_ranks,
    pack_pairs,
)
from worker.jobs import AdapterKey

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


@given(cases())
@check
def test_segments_equal_the_plain_loop(case):
    expected = add_lora_reference(case.x, case.y, case.token_slots, case.pairs)
    add_lora_segments(case.x, case.y, case.runs, case.pairs)
    assert_close(case.y, expected)


@given(cases())
@check
def test_packed_equals_the_plain_loop(case):
    expected = add_lora_reference(case.x, case.y, case.token_slots, case.pairs)
    present = sorted({slot for slot, _, _ in case.runs} & case.pairs.keys())
    if present:
        layout = [(slot, case.pairs[slot].rank) for slot in present]
        mask = foreign_ranks(case.runs, layout, len(case.x), case.x.device)
        add_lora_packed(case.x, case.y, pack_pairs([case.pairs[slot] for slot in present]), mask)
    assert_close(case.y, expected)


@given(cases())
@check
def test_tokens_without_an_adapter_are_left_as_they_are(case):
    before = case.y.clone()
    idle = [token for token, slot in enumerate(case.token_slots) if slot not in case.pairs]
    present = sorted({slot for slot, _, _ in case.runs} & case.pairs.keys())
    add_lora_segments(case.x, case.y, case.runs, case.pairs)
    assert torch.equal(case.y[idle], before[idle])
    if present:
        layout = [(slot, case.pairs[slot].rank) for slot in present]
        mask = foreign_ranks(case.runs, layout, len(case.x), case.x.device)
        packed = pack_pairs([case.pairs[slot] for slot in present])
        after = before.clone()
        add_lora_packed(case.x, after, packed, mask)
        assert torch.equal(after[idle], before[idle])


@given(cases())
@check
def test_mask_gives_each_token_the_columns_of_its_own_slot(case):
    layout = [(slot, pair.rank) for slot, pair in case.pairs.items()]
    mask = foreign_ranks(case.runs, layout, len(case.x), case.x.device)
    columns = [slot for slot, rank in layout for _ in range(rank)]
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[own != slot for slot in columns] for own in case.token_slots]


def test_pairs_side_by_side_compute_their_sum():
    torch.manual_seed(0)
    pairs = [LoRAPair(torch.randn(r, 5), torch.randn(3, r)) for r in (1, 4, 2)]
    packed = pack_pairs(pairs)
    assert packed.rank == 7
    torch.testing.assert_close(packed.b @ packed.a, sum(pair.b @ pair.a for pair in pairs))


# The hook chooses a way; the way changes nothing.


def run_module(case, *, packed_limit, monkeypatch, lora_dtype=None, order=None):
    """What a module of identity weights plus bias gives with the adapters of `case` in their slots."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(case.x.shape[1], case.y.shape[1]).to(case.x.dtype))
    layers = LoRALayers(model, torch.device("cpu"))
    for slot in order or sorted(case.pairs):
        pair = LoRAPair(*(tensor.to(lora_dtype or tensor.dtype) for tensor in case.pairs[slot]))
        layers.put(slot, LoRAWeights(AdapterKey(str(slot), "1"), {"0": pair}))
    with torch.inference_mode(), monkeypatch.context() as patch:
        patch.setattr(lora_layers, "_PACKED_LIMIT", packed_limit)
        plain = model(case.x.unsqueeze(0))[0].clone()
        layers.plan = LoRAPlan(case.runs, len(case.x)) if case.runs else None
        mixed = model(case.x.unsqueeze(0))[0].clone()
        layers.plan = None
        assert torch.equal(model(case.x.unsqueeze(0))[0], plain)
    return plain, mixed


@given(case=cases())
@check
def test_choice_of_plan_does_not_change_the_result(case):
    with pytest.MonkeyPatch.context() as monkeypatch:
        plain, packed = run_module(case, packed_limit=1 << 30, monkeypatch=monkeypatch)
        _, segments = run_module(case, packed_limit=0, monkeypatch=monkeypatch)
    expected = add_lora_reference(case.x, plain, case.token_slots, case.pairs)
    assert_close(packed, expected)
    assert_close(segments, expected)


@given(case=cases(dtypes=[torch.bfloat16]))
@check
def test_adapters_in_float32_over_a_bfloat16_base(case):
    with pytest.MonkeyPatch.context() as monkeypatch:
        for limit in (0, 1 << 30):
            plain, mixed = run_module(
                case, packed_limit=limit, monkeypatch=monkeypatch, lora_dtype=torch.float32
            )
            # One rounding, of the sum: nothing of the product is lost before it.
            delta = add_lora_reference(case.x, torch.zeros_like(plain), case.token_slots, case.pairs)
            torch.testing.assert_close(mixed, (plain.float() + delta).to(plain.dtype), rtol=1e-2, atol=1e-5)


@given(case=cases(dtypes=[torch.float32]))
@check
def test_adapters_in_bfloat16_over_a_float32_base(case):
    with pytest.MonkeyPatch.context() as monkeypatch:
        plain, mixed = run_module(case, packed_limit=0, monkeypatch=monkeypatch, lora_dtype=torch.bfloat16)
    expected = add_lora_reference(case.x, plain, case.token_slots, case.pairs)
    assert mixed.dtype == torch.float32
    assert (mixed - expected).norm() <= TOLERANCE[torch.bfloat16] * (1 + expected.norm())


def pair_of(value):
    return LoRAPair(torch.full((1, 2), value), torch.ones(2, 1))


def weights_of(value, module="0"):
    return LoRAWeights(AdapterKey(f"{value}", "1"), {module: pair_of(value)})


@pytest.fixture
def layers():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return LoRALayers(model, torch.device("cpu")), model


def output(layers, model, *slots, module=0):
    layers.plan = LoRAPlan([(slot, token, token + 1) for token, slot in enumerate(slots)], len(slots))
    try:
        with torch.inference_mode():
            return model[module](torch.ones(1, len(slots), 2))[0, :, 0].tolist()
    finally:
        layers.plan = None


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_slot_is_wholly_replaced_by_its_next_adapter(layers, limit, monkeypatch):
    monkeypatch.setattr(lora_layers, "_PACKED_LIMIT", limit)
    layers, model = layers
    layers.put(0, weights_of(1.0))
    layers.put(1, weights_of(2.0))
    assert output(layers, model, 0, 1, 0, 1) == [2, 4, 2, 4]
    layers.put(0, weights_of(5.0, module="1"))
    assert output(layers, model, 0, 1, 0, 1) == [0, 4, 0, 4]
    assert output(layers, model, 0, 1, 0, 1, module=1) == [10, 0, 10, 0]
    layers.put(0, weights_of(3.0))
    assert output(layers, model, 0, 1, 0, 1) == [6, 4, 6, 4]
    assert output(layers, model, 0, 1, 0, 1, module=1) == [0, 0, 0, 0]
    layers.clear(1)
    assert output(layers, model, 0, 1, 0, 1) == [6, 0, 6, 0]


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_adapter_that_overflows_leaves_its_neighbours_alone(layers, limit, monkeypatch):
    monkeypatch.setattr(lora_layers, "_PACKED_LIMIT", limit)
    layers, model = layers
    layers.put(0, weights_of(1.0))
    layers.put(1, weights_of(3e38))
    layers.put(2, weights_of(2.0))
    fine, huge, also_fine = output(layers, model, 0, 1, 2)
    assert (fine, huge, also_fine) == (2, torch.inf, 4)
