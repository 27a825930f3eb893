"""Text <-> token ids, with a byte-level tokenizer and one that spells spaces inside its words."""

import re
import threading

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests import tiny
from worker.engine.tokenizer import TextStream, Tokenizer
from worker.errors import InvalidLine
from worker.jobs import ChatMessage

check = settings(max_examples=200, deadline=None)
texts = st.text(st.characters(codec="utf-8"), max_size=30)
HARD = "e\u0301 \U0001f469\u200d\U0001f4bb\u00df\ufeff\u4e2d \u202e\x00\n\t  \U0001f600\u0420"


def metaspace() -> Tokenizer:
    """Like Llama 2's: spaces are part of words, unknown characters fall back to bytes."""
    words = ["▁", "▁the", "▁cat", "cat", "s", "▁a", "t", "h", "e", "a", "c", "▁▁"]
    vocab = {token: number for number, token in enumerate(["<s>", "</s>", "<unk>", *BYTE_TOKENS, *words])}
    merges = [
        ("▁", "▁"),
        ("t", "h"),
        ("th", "e"),
        ("▁", "the"),
        ("▁", "a"),
        ("c", "a"),
        ("ca", "t"),
        ("▁", "cat"),
    ]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    inner = Inner(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    inner.decoder = llama_decoder()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    return Tokenizer(fast)


def llama_decoder():
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


def unigram() -> Tokenizer:
    """As `metaspace`, but `transformers` would tidy away a space before a full stop."""
    pieces = ["</s>", "<unk>", "▁", "▁honey", "▁bee", "s", "▁.", ".", "a", "▁a", *BYTE_TOKENS]
    scores = [(piece, -float(number)) for number, piece in enumerate(pieces)]
    inner = Inner(models.Unigram(scores, unk_id=1, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    inner.decoder = llama_decoder()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=True
    )
    return Tokenizer(fast)


BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
BYTES, WORDS, PIECES = Tokenizer(tiny.tokenizer()), metaspace(), unigram()
BOTH = pytest.mark.parametrize("tokenizer", [BYTES, WORDS], ids=["bytes", "words"])


def stream_text(tokenizer, prompt, generated):
    stream = TextStream(tokenizer, prompt)
    pieces = [stream.push(token) for token in generated]
    assert stream.text == "".join(pieces)
    return stream.text


@BOTH
@given(text=texts)
@example(text=HARD)
@check
def test_text_survives_encoding_and_decoding(tokenizer, text):
    assume(tokenizer is BYTES or not text.startswith((" ", "▁")))  # such a space stands for the one put first
    assert tokenizer.decode(tokenizer.encode(text)) == text


@BOTH
@given(before=texts, after=texts)
@example(before="the cat", after=" the cats")
@example(before="the", after="the")
@example(before="", after=" the")
@example(before="a", after="   ")
@example(before=HARD, after=HARD)
@check
def test_continuation_is_what_the_generated_tokens_add_to_the_text(tokenizer, before, after):
    tokens = tokenizer.encode(before + after)
    whole = tokenizer.decode(tokens)
    for cut in range(1, len(tokens)):
        prompt, generated = tokens[:cut], tokens[cut:]
        known = tokenizer.decode(prompt)
        if "\ufffd" not in known:  # the border lies between characters
            assert known + tokenizer.continuation(prompt, generated) == whole


def test_leading_space_of_the_first_generated_word_is_kept():
    prompt = WORDS.encode("the")
    space_cat = WORDS.encode("the cat")[len(prompt) :]
    assert WORDS.decode(space_cat) == "cat"
    assert WORDS.continuation(prompt, space_cat) == " cat"
    assert stream_text(WORDS, prompt, space_cat) == " cat"


@BOTH
def test_special_tokens_are_not_part_of_the_text(tokenizer):
    end = tokenizer._tokenizer.eos_token_id
    prompt, generated = tokenizer.encode("the cat"), tokenizer.encode("the cat a")[-2:]
    plain = tokenizer.continuation(prompt, generated)
    assert tokenizer.continuation(prompt, [*generated, end]) == plain
    assert tokenizer.continuation([end, *prompt, end], [end, *generated]) == plain
    assert stream_text(tokenizer, [*prompt, end], [end, *generated, end, end]) == plain
    assert tokenizer.decode_one(end) == "</s>"


@BOTH
@given(prompt=texts.filter(bool), text=texts)
@example(prompt="the", text=" the  cats ")
@example(prompt=HARD, text=HARD)
@check
def test_stream_is_the_whole_decode(tokenizer, prompt, text):
    tokens = tokenizer.encode(prompt + text)
    cut = len(tokenizer.encode(prompt))
    if tokenizer.decode(tokens[:cut]) != prompt:  # the border lies inside a token
        return
    whole = tokenizer.continuation(tokens[:cut], tokens[cut:])
    streamed = stream_text(tokenizer, tokens[:cut], tokens[cut:])
    assert streamed + "\ufffd" * (len(whole) - len(streamed)) == whole


@given(
    prompt=st.lists(st.integers(0, 256), max_size=12), generated=st.lists(st.integers(0, 256), max_size=30)
)
@example(prompt=[0], generated=[195, 65])
@check
def test_stream_of_any_tokens_after_whole_characters_is_the_whole_decode(prompt, generated):
    prompt = [*prompt, 65]
    whole, streamed = BYTES.continuation(prompt, generated), stream_text(BYTES, prompt, generated)
    assert whole.startswith(streamed)
    assert set(whole[len(streamed) :]) <= {"\ufffd"}, "only what may become a character is held back"


plain_texts = st.lists(
    st.sampled_from(["the", "cat", "cats", "honey", "bees", "a", "Oh", ".", "é\U0001f600", ""]), min_size=1
).map(" ".join)


@pytest.mark.parametrize("tokenizer", [BYTES, WORDS, PIECES], ids=["bytes", "words", "pieces"])
@given(before=plain_texts.filter(bool), after=plain_texts)
@example(before="a", after=" honey bees .")
@settings(max_examples=50, deadline=None)
def test_texts_of_the_tokens_make_up_the_text(tokenizer, before, after):
    tokens = tokenizer.encode(before + after)
    cut = len(tokenizer.encode(before))
    assume(tokens[:cut] == tokenizer.encode(before))  # else the border lies inside a token
    spelled = [tokenizer.decode_one(token) for token in tokens]
    whole, added = tokenizer.decode(tokens), tokenizer.continuation(tokens[:cut], tokens[cut:])
    first = 0 if tokenizer is BYTES else 1  # the space that is put before a text, and not decoded
    assert_spells("".join(spelled)[first:], whole)
    assert_spells("".join(spelled[cut:]), added)


def assert_spells(joined, text):
    """Where a character has several tokens, each of them is U+FFFD."""
    assert re.sub("\ufffd+", "?", joined) == re.sub(r"[^\x00-\x7f]+", "?", text)


def test_word_keeps_its_space_when_it_stands_alone():
    space_honey, space_stop = PIECES.encode("a honey .")[-2:]
    assert [PIECES.decode_one(token) for token in (space_honey, space_stop)] == [" honey", " ."]
    assert PIECES.decode([space_honey]) == "honey"


@pytest.mark.parametrize("tokenizer", [BYTES, WORDS, PIECES], ids=["bytes", "words", "pieces"])
def test_part_of_a_character_is_a_replacement_character(tokenizer):
    assert [tokenizer.decode_one(token) for token in tokenizer.encode("a\U0001f600")[-4:]] == ["\ufffd"] * 4


def test_special_tokens_are_spelled_as_they_are():
    assert [WORDS.decode_one(token) for token in (0, 1)] == ["<s>", "</s>"]
    assert [PIECES.decode_one(token) for token in (0, 1)] == ["</s>", "<unk>"]


def test_special_token_gets_no_space_where_words_have_theirs_from_the_decoder():
    inner = Inner(models.WordPiece({"[SEP]": 0, "[UNK]": 1, "a": 2, "bee": 3, "##s": 4}, unk_token="[UNK]"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=inner, sep_token="[SEP]"))
    assert [tokenizer.decode_one(token) for token in (3, 4, 0)] == [" bee", "s", "[SEP]"]


def test_character_that_begins_in_the_prompt_is_not_lost():
    first, *rest = BYTES.encode("é")
    prompt, generated = [65, first], [*rest, 66]
    assert stream_text(BYTES, prompt, generated) == BYTES.continuation(prompt, generated)


@BOTH
def test_stream_speaks_in_whole_characters(tokenizer):
    prompt = tokenizer.encode("a")
    generated = tokenizer.encode("a\U0001f600é")[len(prompt) :]
    stream = TextStream(tokenizer, prompt)
    assert [stream.push(token) for token in generated] == ["", "", "", "\U0001f600", "", "é"]


def test_stream_decodes_few_tokens_at_a_time_however_long_the_text():
    seen = []

    class Counting(Tokenizer):
        def decode(self, tokens):
            seen.append(len(tokens))
            return super().decode(tokens)

    stream = TextStream(Counting(tiny.tokenizer()), [65] * 500)
    for _ in range(300):
        stream.push(65)
    assert max(seen) < 10


def test_stream_decodes_few_tokens_at_a_time_however_much_of_it_is_no_text():
    seen = []

    class Counting(Tokenizer):
        def decode(self, tokens):
            seen.append(len(tokens))
            return super().decode(tokens)

    stream = TextStream(Counting(tiny.tokenizer()), [65])
    invalid = BYTES.encode("é")[0]
    for _ in range(300):
        stream.push(invalid)
    assert max(seen) < 50


def test_many_threads_may_encode_at_once():
    texts, results = ["the cat " * number for number in range(40)], {}

    def encode(worker):
        results[worker] = [BYTES.encode(text) for text in texts]

    threads = [threading.Thread(target=encode, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(results.values()) == [[BYTES.encode(text) for text in texts]] * 4


# Chats

USER = ChatMessage("user", "Hi")


def with_template(template):
    inner = tiny.tokenizer()
    inner.chat_template = template
    return Tokenizer(inner)


def test_chat_is_rendered_ready_for_an_answer():
    messages = [ChatMessage("system", "Be brief"), USER]
    assert BYTES.render_chat(messages) == "<system>Be brief<user>Hi<assistant>"


def test_rendered_chat_gets_no_special_tokens_twice():
    fast = metaspace()._tokenizer
    fast.chat_template = "<s>{{ messages[0].content }}"
    fast.add_bos_token = True
    tokenizer = Tokenizer(fast)
    tokens = tokenizer.encode_chat(tokenizer.render_chat([ChatMessage("user", "the")]))
    assert tokens.count(fast.bos_token_id) == 1


def test_chat_without_a_template_is_refused():
    with pytest.raises(InvalidLine, match="no chat template"):
        with_template(None).render_chat([USER])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Only user and assistant roles') }}", "Only user and assistant roles"),
        ("{{ messages[7].content.strip() }}", "refuses the messages"),
        ("{% if %}", "refuses the messages"),
        ("{{ 1 / 0 }}", "refuses the messages"),
    ],
)
def test_template_that_raises_is_refused_with_its_reason(template, reason):
    with pytest.raises(InvalidLine, match=reason):
        with_template(template).render_chat([USER])
