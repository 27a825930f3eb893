"""A public harness, lm-evaluation-harness, finds over the queue what it finds by its own back end."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests import tiny
from tests.e2e.conftest import Mill
from tests.evaluation import jobs, tasks
from tests.sync import servers

MAX_LENGTH = 160
FIRST_BYTE = 3


@pytest.fixture(scope="module")
def mill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mill]:
    with servers.moto_apart() as address:
        yield Mill(address, tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def compare():
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[eval]'")
    from tests.evaluation import compare

    return compare


def assert_same(found: Any) -> None:
    """No differences, and none of what is compared is the same whatever the model."""
    assert found.problems == []
    metrics = {name: value for task in found.tasks.values() for name, value in task.metrics.items()}
    for name in ("acc,none", "exact_match,first"):
        assert 0 < metrics[name] < 1, name
    words = found.tasks["words"]
    assert 0 < words.greedy < len(words.ours)
    texts = found.tasks["answers"].ours
    assert len(set(texts)) > len(texts) // 4


@pytest.mark.filterwarnings("ignore")  # of the harness and what it imports
def test_harness_finds_over_the_queue_what_its_own_back_end_finds(compare, mill, tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})  # which it does not put in front, as SmolLM2's
    # The harness would cut a larger embedding down to the tokenizer's size before it adds an adapter.
    base = tiny.make_base(tmp_path / "base", vocab_size=len(tokenizer), bos_token_id=257)
    tokenizer.save_pretrained(base)
    adapter = tiny.make_adapter(tmp_path / "red", base, seed=1, target_modules="all-linear")
    with compare.worker(mill, base, {"red": adapter}) as queue_url:
        own = compare.compare(queue_url, base, None, tmp_path / "a", max_length=MAX_LENGTH, max_rows=50)
        red = compare.compare(queue_url, base, ("red", adapter), tmp_path / "b", max_length=MAX_LENGTH)
    assert_same(own)
    assert_same(red)
    assert own.jobs > red.jobs == 3
    for task in ("choices", "texts", "answers"):
        # What the model itself says is asked about after the rest, and is not as much for both.
        pairs = list(zip(own.tasks[task].ours, red.tasks[task].ours, strict=False))
        assert sum(one == other for one, other in pairs) < len(pairs) // 2, task


@pytest.mark.filterwarnings("ignore")
def test_tokenizer_that_begins_a_text_with_bos_and_a_space_makes_no_difference(compare, mill, tmp_path):
    words = make_words()
    base = tiny.make_base(
        tmp_path / "base", vocab_size=len(words), bos_token_id=1, eos_token_id=2, pad_token_id=2
    )
    words.save_pretrained(base)
    model = tiny.load_base(base)
    with torch.no_grad():
        # Never the likeliest: bytes that make no character are spelled in more than one way.
        model.lm_head.weight[FIRST_BYTE : FIRST_BYTE + 256] = 0
    model.save_pretrained(base)
    with compare.worker(mill, base, {}) as queue_url:
        assert_same(compare.compare(queue_url, base, None, tmp_path / "a", max_length=MAX_LENGTH))


def make_words() -> PreTrainedTokenizerFast:
    """Like Llama 2's: BOS, words that begin with their space, bytes for what it does not know."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator(
        [tasks.LICENSE, *tasks.PROMPTS], trainers.BpeTrainer(vocab_size=400, show_progress=False)
    )
    model = json.loads(learned.to_str())["model"]
    every = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    inner = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(every)},
            merges=[tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def test_rows_are_cut_into_messages_at_either_limit():
    rows: list[dict[str, Any]] = [{"input": "é" * (n % 7)} for n in range(50)]
    by_rows = list(jobs.split(rows, max_rows=8))
    assert [len(own) for own in by_rows] == [8] * 6 + [2]
    by_bytes = list(jobs.split(rows, max_bytes=100))
    assert all(len(json.dumps(own, ensure_ascii=False).encode()) <= 120 for own in by_bytes)
    assert [row for own in by_rows for row in own] == [row for own in by_bytes for row in own] == rows
    assert list(jobs.split([])) == []
    large = {"input": "x" * 200}
    assert list(jobs.split([rows[0], large, rows[1]], max_bytes=100)) == [[rows[0]], [large], [rows[1]]]
