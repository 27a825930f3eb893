"""Text <-> token ids, through the tokenizer of the base model or of an adapter."""

import json
import math
import threading
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from worker.engine.chat_templates import ChatTemplates, TemplateTooSlow
from worker.errors import InvalidLine
from worker.jobs import ChatMessage

TOKENIZER_FILE = "tokenizer.json"
_WITH_PATTERNS = ("normalizer", "pre_tokenizer", "decoder")
_REPLACEMENT = "�"
_CONTEXT_TOKENS = 6
"""Prompt tokens decoded along with the first generated ones: some tokenizers spell a token by what is
before it (a leading space, half a character)."""


class Tokenizer:
    """May be used from any thread."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        whose: str = "the base model",
        templates: ChatTemplates | None = None,
    ) -> None:
        """`whose` it is, for messages. `templates` renders the chat template of one that is not trusted."""
        self._tokenizer = tokenizer
        self._whose = whose
        self._templates = templates
        self._too_slow_from = math.inf
        """Chats of so many characters and more are not tried again."""
        self._lock = threading.Lock()  # fast tokenizers raise "Already borrowed" on concurrent encoding
        self._special = frozenset(
            token for token, added in tokenizer.added_tokens_decoder.items() if added.special
        )
        self._anchor: list[int] = tokenizer.encode("a", add_special_tokens=False)
        """A plain text to decode a token behind, for those that lose their space where a text begins."""
        self._anchor_text = self._spell(self._anchor)

    def encode(self, text: str) -> tuple[int, ...]:
        with self._lock:
            return tuple(self._tokenizer.encode(text))

    @property
    def num_tokens(self) -> int:
        """Ids from this on are no token's."""
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1

    @property
    def eos_token_id(self) -> int | None:
        own = self._tokenizer.eos_token_id
        return None if own is None else int(own)

    @property
    def first_token(self) -> int:
        """What stands before a text that nothing comes before: the BOS token, else the EOS token.

        Raises InvalidLine if there is neither.
        """
        for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise InvalidLine(
            f"The row has no context, and {self._whose} has no BOS or EOS token to stand for it"
        )

    @property
    def chat_templates(self) -> object:
        """The chat template, or several by name; None without one."""
        return self._tokenizer.chat_template

    @property
    def patterns(self) -> frozenset[str]:
        """See `patterns_of` and `patterns_in`."""
        file = Path(self._tokenizer.name_or_path, TOKENIZER_FILE)
        return patterns_of(self._tokenizer) | (patterns_in(file) if file.is_file() else frozenset())

    def render_chat(self, messages: Sequence[ChatMessage]) -> str:
        """The prompt that the model's chat template makes of `messages`, ready for an answer.

        Raises InvalidLine if there is no template, or it refuses the messages.
        """
        if self._tokenizer.chat_template is None:
            raise InvalidLine(f"The row has messages, and {self._whose} has no chat template")
        conversation: list[dict[str, Any]] = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return self._render(conversation)
        except Exception as exc:
            raise InvalidLine(f"The chat template of {self._whose} refuses the messages: {exc}") from exc

    def _render(self, conversation: list[dict[str, Any]]) -> str:
        if self._templates is None:
            return str(
                self._tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
            )
        size = sum(len(message["content"]) + 1 for message in conversation)
        if size >= self._too_slow_from:
            raise TemplateTooSlow(f"it took too long for {self._too_slow_from} characters already")
        template, special_tokens = self._tokenizer.get_chat_template(), self._tokenizer.special_tokens_map
        try:
            return self._templates.render(template, conversation, special_tokens)
        except TemplateTooSlow:
            self._too_slow_from = min(size, self._too_slow_from)
            raise

    def encode_chat(self, rendered: str) -> tuple[int, ...]:
        """Token ids of a rendered chat; the template has put the special tokens there."""
        with self._lock:
            return tuple(self._tokenizer.encode(rendered, add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens` without the special ones."""
        text = self._tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    def decode_one(self, token: int) -> str:
        """The text of one token as it stands within a text, special tokens spelled out.

        The texts of successive tokens make up their text. A token that is a part of a character has U+FFFD,
        and what begins a text keeps the space that some tokenizers put there and do not decode.
        """
        if token not in self._special:
            whole = self._spell([*self._anchor, token])
            if whole.startswith(self._anchor_text):
                return whole[len(self._anchor_text) :]
        return self._spell([token])

    def context(self, prompt: Sequence[int]) -> list[int]:
        """The prompt's last tokens, as many as it takes to begin and end between characters."""
        for length in (_CONTEXT_TOKENS, 3 * _CONTEXT_TOKENS, 9 * _CONTEXT_TOKENS, len(prompt)):
            context = list(prompt[-length:])
            if _REPLACEMENT not in self.decode(context):
                return context
        return [] if self.decode(context).endswith(_REPLACEMENT) else context

    def continuation(self, prompt: Sequence[int], generated: Sequence[int]) -> str:
        """The text that `generated` adds after `prompt`."""
        context = self.context(prompt)
        before, whole = self.decode(context), self.decode([*context, *generated])
        return whole[len(before) :] if whole.startswith(before) else self.decode(generated)

    def _spell(self, tokens: list[int]) -> str:
        """Text of `tokens` with the special ones."""
        return str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


def patterns_of(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The regular expressions that it puts texts through."""
    rust = getattr(tokenizer, "backend_tokenizer", None)
    parts = [getattr(rust, part, None) for part in _WITH_PATTERNS]
    states = [json.loads(part.__getstate__()) for part in parts if part is not None]
    return frozenset(_patterns(states))


def patterns_in(file: Path) -> frozenset[str]:
    """The same of a tokenizer.json, of which transformers may make others. Raises OSError and ValueError."""
    said = json.loads(file.read_bytes())
    return frozenset(_patterns([said.get(part) for part in _WITH_PATTERNS] if isinstance(said, dict) else []))


def _patterns(state: object) -> Iterator[str]:
    """Those in a part of a tokenizer.json."""
    if isinstance(state, dict):
        if isinstance(pattern := state.get("Regex"), str):
            yield pattern
        state = list(state.values())
    if isinstance(state, list):
        for part in state:
            yield from _patterns(part)


class TextStream:
    """The text of a growing sequence, token by token, only ever in whole characters.

    Decodes a few tokens at a time, whatever the length so far.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = tokenizer.context(prompt)
        self._start = 0
        """First token of the window that is decoded."""
        self._done = len(self._tokens)
        """Tokens before this one have been turned into `text`."""
        self.text = ""
        self._told = 0
        """Characters of it that `tell` has returned."""

    def push(self, token: int) -> str:
        """Take one more generated token; returns the text it completes, perhaps none."""
        self._tokens.append(token)
        before = self._tokenizer.decode(self._tokens[self._start : self._done])
        whole = self._tokenizer.decode(self._tokens[self._start :])
        if len(whole) <= len(before):
            return ""
        if whole.endswith(_REPLACEMENT):
            return self._give_up(before, whole)
        self._start, self._done = self._done, len(self._tokens)
        new = whole[len(before) :]
        self.text += new
        return new

    def tell(self, stops: Collection[str] = ()) -> str:
        """What has come to `text` since the last call, but for an end that one of `stops` may begin with."""
        text = self.text
        begun = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        begin, self._told = self._told, len(text) - max(begun, default=0)
        return text[begin : self._told]

    def _give_up(self, before: str, whole: str) -> str:
        """A character has four bytes at most: what is older and no text will not become any."""
        if len(self._tokens) - self._done <= _CONTEXT_TOKENS:
            return ""
        for pending in (3, 2, 1):
            head = self._tokenizer.decode(self._tokens[self._start : -pending])
            if head + self._tokenizer.decode(self._tokens[-pending:]) == whole and len(head) > len(before):
                self._start = self._done = len(self._tokens) - pending
                new = head[len(before) :]
                self.text += new
                return new
        return ""
