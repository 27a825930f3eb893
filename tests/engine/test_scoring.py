"""What is scored of an input and a target: lm-evaluation-harness's own rule, spelled out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny
from tests.engine.test_tokenizer import BOTH, BYTES, check, metaspace
from worker.engine.scoring import read_pair
from worker.engine.tokenizer import Tokenizer
from worker.errors import InvalidLine
from worker.jobs import ChatMessage, Row, Task

EOS = 256
BEGINNING = Tokenizer(tiny.tokenizer())
"""Puts the EOS, which it calls BOS, before every text, as Llama's tokenizer puts its BOS."""
BEGINNING._tokenizer.bos_token = tiny.EOS
BEGINNING.encode = lambda text: (EOS, *BYTES.encode(text))
texts = st.text(st.characters(codec="utf-8"), max_size=12)


def row(text=None, target=None, **fields):
    return Row(index=0, id="0", text=text, target=target, task=Task.SCORE, **fields)


def pair(tokenizer, *given, **fields):
    return read_pair(tokenizer, row(*given, **fields))


def bytes_of(text):
    return BYTES.encode(text)


def test_target_is_what_comes_after_the_input():
    assert pair(BYTES, "ab", " cd") == (bytes_of("ab cd"), 3)
    assert pair(BEGINNING, "ab", " cd") == ((EOS, *bytes_of("ab cd")), 3)


def test_without_a_target_all_is_scored_but_the_first_token():
    assert pair(BYTES, "abc") == (bytes_of("abc"), 2)
    assert pair(BEGINNING, "abc") == ((EOS, *bytes_of("abc")), 3)


@pytest.mark.parametrize("space", [" ", "  ", "\n", " \t\n"])
def test_space_at_the_end_of_the_input_belongs_to_the_target(space):
    assert pair(BYTES, f"ab{space}", "cd") == pair(BYTES, "ab", f"{space}cd")
    assert pair(BYTES, f"ab{space}", "cd").num_targets == 2 + len(space)


@pytest.mark.parametrize("context", ["", " ", "\n"])
def test_first_token_stands_for_an_empty_input(context):
    assert pair(BYTES, context, "cd") == ((EOS, *bytes_of(f"{context}cd")), 2 + len(context))
    assert pair(BEGINNING, context, "cd") == ((EOS, *bytes_of(f"{context}cd")), 2 + len(context)), "once"


def test_whole_is_encoded_at_once_and_cut_where_the_input_ends_by_itself():
    words = metaspace()
    before, whole = words.encode("the"), words.encode("the cat")
    assert pair(words, "the ", "cat") == (whole, len(whole) - len(before))
    # The input by itself has more tokens than its part of the whole.
    before, whole = words.encode("c"), words.encode("cat the cat")
    assert (len(before), len(whole)) == (2, 3)
    assert pair(words, "c", "at the cat") == ((*before, whole[2]), 1)
    with pytest.raises(InvalidLine, match="target has no tokens of its own"):
        pair(words, "the c", "at")


@BOTH
@given(context=texts, target=texts)
@check
def test_any_texts_are_a_pair_by_the_reference_rule_or_have_nothing_to_score(tokenizer, context, target):
    bare = context.rstrip()
    before = tokenizer.encode(bare)
    after = tokenizer.encode(context + target)[len(before) :]
    before = before or (tokenizer.first_token,)
    if not after:
        with pytest.raises(InvalidLine, match="target has no tokens of its own"):
            pair(tokenizer, context, target)
    else:
        assert pair(tokenizer, context, target) == (before + after, len(after))


def test_messages_are_the_input_as_the_template_renders_them():
    messages = (ChatMessage("user", "hi"),)
    assert pair(BYTES, target="ho", messages=messages) == (bytes_of("<user>hi<assistant>ho"), 2)
    assert pair(BEGINNING, target="ho", messages=messages) == (bytes_of("<user>hi<assistant>ho"), 2)


def test_token_ids_are_taken_as_they_are():
    assert pair(BEGINNING, tokens=(1, 2), target=(3,)) == ((1, 2, 3), 1)
    assert pair(BEGINNING, tokens=(1, 2, 3)) == ((1, 2, 3), 2)
    assert pair(BEGINNING, tokens=(), target=(3, 4)) == ((EOS, 3, 4), 2)
    assert pair(BEGINNING, tokens=(), target=(EOS, 4)) == ((EOS, 4), 1)


@pytest.mark.parametrize(
    ("given_fields", "reason"),
    [
        ({"text": "a", "target": ""}, "target has no tokens of its own"),
        ({"text": "", "target": ""}, "target has no tokens of its own"),
        ({"text": ""}, "input has fewer than two tokens"),
        ({"text": "a"}, "input has fewer than two tokens"),
        ({"tokens": (1,)}, "input has fewer than two tokens"),
        ({"tokens": (), "target": (EOS,)}, "target has no tokens of its own"),
    ],
)
def test_where_nothing_is_left_to_score_the_row_is_refused(given_fields, reason):
    with pytest.raises(InvalidLine, match=reason):
        pair(BYTES, **given_fields)


def test_tokenizer_with_nothing_to_stand_first_needs_an_input():
    bare = Tokenizer(tiny.tokenizer())
    bare._tokenizer.eos_token = None
    assert pair(bare, "a", "b") == (bytes_of("ab"), 1)
    with pytest.raises(InvalidLine, match="no BOS or EOS token"):
        pair(bare, "", "b")
