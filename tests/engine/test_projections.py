"""A base model's linear modules, fused and packed, compute what they computed before."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests import tiny
from worker.engine import products
from worker.engine.discovery import discover
from worker.engine.products import has_bfloat16, make_product, product_dtype
from worker.engine.projections import Projection, tied_weights

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("rows", [0, 1, 3, 16, 33, 200])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_product_is_the_plain_one(rows, bias):
    linear = nn.Linear(48, 40, bias=bias)
    product, needs_weight = make_product(linear.weight.data, linear.bias)
    x = torch.randn(rows, 48)
    torch.testing.assert_close(product(x), linear(x))
    assert not needs_weight
    wide = torch.randn(rows, 96)
    torch.testing.assert_close(product(wide[:, 48:]), linear(wide[:, 48:]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_multiplied_at_least_as_exactly_as_it_is_stored(dtype):
    weight, x = torch.randn(40, 48).to(dtype), torch.randn(7, 48).to(dtype)
    y = make_product(weight, None)[0](x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, (x.double() @ weight.double().T).to(dtype))


def test_row_is_the_same_whatever_stands_beside_it():
    product, _ = make_product(torch.randn(96, 64), None)
    x = torch.randn(33, 64)
    together = product(x)
    for row in range(33):
        torch.testing.assert_close(product(x[row : row + 1])[0], together[row], rtol=1e-5, atol=1e-5)


def test_without_onednn_the_plain_product_keeps_its_weight(monkeypatch):
    monkeypatch.setattr(products.torch.backends.mkldnn, "is_available", lambda: False)
    weight, x = torch.randn(40, 48), torch.randn(5, 48)
    product, needs_weight = make_product(weight, None)
    assert needs_weight
    torch.testing.assert_close(product(x), x @ weight.T)


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16"])
def test_bfloat16_is_told_from_the_processor(name, monkeypatch):
    monkeypatch.setattr(products.torch.cpu, "get_capabilities", lambda: {"avx2": True, name: False})
    assert not has_bfloat16(CPU)
    monkeypatch.setattr(products.torch.cpu, "get_capabilities", lambda: {"avx2": True, name: True})
    assert has_bfloat16(CPU)


@pytest.mark.parametrize(
    ("dtype", "known", "expected"),
    [
        ("float32", True, "float32"),
        ("bfloat16", True, "bfloat16"),
        ("bfloat16", False, "float32"),
        ("float16", True, "float32"),
    ],
)
def test_halves_are_multiplied_as_float32_where_the_processor_has_no_way_with_them(
    dtype, known, expected, monkeypatch
):
    monkeypatch.setattr(products, "has_bfloat16", lambda _: known)
    assert product_dtype(getattr(torch, dtype), CPU) is getattr(torch, expected)
    assert product_dtype(getattr(torch, dtype), torch.device("cuda")) is getattr(torch, dtype)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 9), nn.Linear(12, 5, bias=False), Conv1D(7, 12)

    def forward(self, x):
        return self.q(x), self.k(x), self.v(x)


def project(*modules, keep=frozenset()):
    return Projection(modules, keep)


def test_group_computes_what_its_modules_did_and_lets_their_weights_go():
    attention, x = Attention(), torch.randn(2, 6, 12)
    expected = [y.clone() for y in attention(x)]
    projection = project(attention.q, attention.k, attention.v)
    for got, own in zip(attention(x), expected, strict=True):
        torch.testing.assert_close(got, own)
    assert projection.sizes == [9, 5, 7]
    assert attention.q.weight.numel() == attention.v.weight.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_those_of_the_weights_that_were_taken(dtype):
    attention = Attention().to(dtype)
    weights = [attention.q.weight, attention.k.weight, attention.v.weight.T]
    expected = torch.cat([weight.float().norm(dim=1) for weight in weights])
    torch.testing.assert_close(project(attention.q, attention.k, attention.v).row_norms, expected)


def test_members_may_be_called_in_any_order_alone_or_with_other_inputs():
    attention = Attention()
    x, other = torch.randn(1, 3, 12), torch.randn(1, 4, 12)
    plain = {name: getattr(attention, name)(t).clone() for name in "qkv" for t in (x,)}
    plain_other = attention.k(other).clone()
    project(attention.q, attention.k, attention.v)
    torch.testing.assert_close(attention.v(x), plain["v"])
    torch.testing.assert_close(attention.k(other), plain_other)
    torch.testing.assert_close(attention.q(x), plain["q"])
    torch.testing.assert_close(attention.q(x), plain["q"])
    torch.testing.assert_close(attention.k(x), plain["k"])


def test_new_values_in_the_same_place_are_not_taken_for_the_old_ones():
    attention = Attention()
    project(attention.q, attention.k, attention.v)
    x = torch.randn(1, 3, 12)
    first = [y.clone() for y in attention(x)]
    x.mul_(2)
    for got, own in zip(attention(x), first, strict=True):
        assert not torch.allclose(got, own)


def test_addition_sees_the_whole_group_and_changes_the_output():
    attention, x = Attention(), torch.randn(1, 4, 12)
    expected = torch.cat([*attention(x)], dim=-1)
    projection = project(attention.q, attention.k, attention.v)
    projection.addition = lambda x, y: y.add_(x.sum(dim=1, keepdim=True))
    torch.testing.assert_close(torch.cat([*attention(x)], dim=-1), expected + x.sum(dim=-1, keepdim=True))


def test_tied_weights_stay():
    embedding, head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head)
    ids = torch.arange(5)
    expected = model(ids).clone()
    project(head, keep=tied_weights(model))
    torch.testing.assert_close(model(ids), expected)
    assert embedding.weight.shape == (20, 8)


def test_pass_that_broke_off_leaves_nothing_behind():
    attention = Attention()
    projection = project(attention.q, attention.k, attention.v)
    x = torch.randn(1, 3, 12)
    expected = attention.k(x).clone()
    attention.q(x)
    projection.forget()
    torch.testing.assert_close(attention.k(x), expected)


GROUPS = {
    "llama": {("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)},
    "gpt2": {("c_attn",), ("c_proj",), ("c_fc",)},
    "phi3": {("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",)},
    "opt": {("q_proj", "k_proj", "v_proj"), ("out_proj",), ("fc1",), ("fc2",)},
}


@pytest.mark.parametrize("architecture", GROUPS)
def test_modules_that_share_an_input_are_found(architecture, tmp_path):
    model = tiny.load_base(tiny.make_base(tmp_path / "base", architecture))
    found = discover(model, lambda: model(torch.arange(12).view(2, 6)), 12)
    names = {tuple(name.rsplit(".", 1)[-1] for name in group) for group in found.groups}
    assert names == GROUPS[architecture]
    assert len(found.groups) == 3 * 4
    assert found.head is not None
    assert found.targets[found.head].is_head


def test_module_that_is_called_twice_stays_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def get_output_embeddings(self):
            return None

        get_input_embeddings = get_output_embeddings

        def forward(self, x):
            return self.a(self.a(x)) + self.b(x)

    model = Twice()
    found = discover(model, lambda: model(torch.randn(2, 3, 4)), 6)
    assert found.groups == [("a",), ("b",)]
    assert found.head is None
