"""Tokenizers that adapters bring along, each kind in memory once."""

import functools
import hashlib
import threading
import weakref
from collections import OrderedDict
from pathlib import Path

from transformers import AutoTokenizer

from adapters_sync.layout import MODEL_PY, PUBLISHED_MANIFEST
from worker.engine.adapters.config import CONFIG_FILE
from worker.engine.chat_templates import ChatTemplates
from worker.engine.tokenizer import TOKENIZER_FILE, Tokenizer, patterns_in, patterns_of
from worker.errors import AdapterInvalid
from worker.jobs import AdapterKey

_NEEDED = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""A folder with any of these has a tokenizer."""
_WEIGHTS = frozenset({".bin", ".gguf", ".md", ".pt", ".pth", ".safetensors"})
"""Ends of files that say nothing about it. All else may: a tokenizer's code reads files of many names."""
_MAX_FILE_BYTES = 128 << 20
"""Of a file that is needed. Those of 256,000 tokens have a quarter of it."""
_KEPT_BYTES = 256 << 20
"""Of such files whose tokenizers stay in memory after their last use; there they take three times as much."""
_REMEMBERED = 10_000
"""Versions of adapters whose files need not be looked at again."""
_CHUNK_BYTES = 1 << 20
_OF_OTHERS = frozenset({CONFIG_FILE, MODEL_PY, PUBLISHED_MANIFEST})
"""Files that differ from adapter to adapter, and that no tokenizer is read from."""


class AdapterTokenizers:
    """Reads the tokenizer in an adapter's folder. From any thread.

    Adapters are commonly saved with the tokenizer of their base model: folders with the same files share one,
    for as long as somebody uses it. What takes up time and memory by its own choice is not let in: regular
    expressions are the base model's or none, and another chat template is rendered in a process of its own.
    """

    def __init__(self, base: Tokenizer, *, kept_bytes: int = _KEPT_BYTES) -> None:
        self._base = base
        self._templates = ChatTemplates()
        self._kept_bytes = kept_bytes
        self._lock = threading.Lock()
        self._kinds: OrderedDict[AdapterKey, bytes | str | None] = OrderedDict()
        """A digest of the files, what is wrong with them, or None where there is no tokenizer."""
        self._loading: dict[bytes, threading.Lock] = {}
        self._loaded: weakref.WeakValueDictionary[bytes, Tokenizer] = weakref.WeakValueDictionary()
        self._kept: OrderedDict[bytes, tuple[Tokenizer, int]] = OrderedDict()
        """Those that were used last, with the bytes of their files."""

    def of(self, key: AdapterKey, folder: Path) -> Tokenizer | None:
        """The tokenizer of an adapter's version, whose files never change; see `read`.

        AdapterInvalid names the adapter.
        """
        with self._lock:
            is_known, kind = key in self._kinds, self._kinds.get(key)
        if isinstance(kind, str):
            raise _invalid(key, kind)
        try:
            if not is_known:
                kind = _digest(folder)
            found = None if kind is None else self._of_kind(kind, folder)
        except AdapterInvalid as exc:
            self._remember(key, str(exc))
            raise _invalid(key, str(exc)) from exc
        if not is_known:
            self._remember(key, kind)
        return found

    def _remember(self, key: AdapterKey, kind: bytes | str | None) -> None:
        with self._lock:
            self._kinds[key] = kind
            if len(self._kinds) > _REMEMBERED:
                self._kinds.popitem(last=False)

    def read(self, folder: Path) -> Tokenizer | None:
        """The folder's tokenizer; None if there is none.

        No code of the folder is run. Raises AdapterInvalid if it cannot be used, and OSError.
        """
        digest = _digest(folder)
        return None if digest is None else self._of_kind(digest, folder)

    def _of_kind(self, digest: bytes, folder: Path) -> Tokenizer:
        with self._lock:
            found = self._loaded.get(digest)
            if found is not None:
                if digest in self._kept:
                    self._kept.move_to_end(digest)
                return found
            loading = self._loading.setdefault(digest, threading.Lock())
        with loading:  # others of its kind wait for it; all else goes on
            found = self._loaded.get(digest)
            if found is None:
                try:
                    found = self._load(folder)
                    self._keep(digest, found, sum(path.stat().st_size for path in _needed(folder)))
                finally:
                    with self._lock:
                        self._loading.pop(digest, None)
        return found

    def _keep(self, digest: bytes, tokenizer: Tokenizer, num_bytes: int) -> None:
        with self._lock:
            self._loaded[digest] = tokenizer
            self._kept[digest] = tokenizer, num_bytes
            while len(self._kept) > 1 and sum(size for _, size in self._kept.values()) > self._kept_bytes:
                self._kept.popitem(last=False)

    @functools.cached_property
    def _patterns(self) -> frozenset[str]:
        """The base model's, which take a moment to find: few adapters bring a tokenizer."""
        return self._base.patterns

    def _check_patterns(self, patterns: frozenset[str]) -> None:
        """To be called before one of them is run."""
        foreign = sorted(patterns - self._patterns)
        if foreign:
            reason = f"a regular expression that the base model's has not: {foreign[0][:200]}"
            raise AdapterInvalid(f"its tokenizer has {reason}", "file")

    def _load(self, folder: Path) -> Tokenizer:
        try:
            if (file := folder / TOKENIZER_FILE).is_file():  # to load it may run it
                self._check_patterns(patterns_in(file))
            loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            self._check_patterns(patterns_of(loaded))
            own = None if loaded.chat_template == self._base.chat_templates else self._templates
            return Tokenizer(loaded, "the adapter's tokenizer", own)
        except (MemoryError, AdapterInvalid):
            raise
        except Exception as exc:  # an upload finds ways to make a library raise that nobody listed
            if isinstance(exc, OSError) and exc.errno is not None:  # the disk's; transformers' own have none
                raise
            reason = f"{type(exc).__name__}: {' '.join(str(exc).split())[:500]}"
            raise AdapterInvalid(f"its tokenizer cannot be read: {reason}", "file") from exc


def _invalid(key: AdapterKey, reason: str) -> AdapterInvalid:
    return AdapterInvalid(f"Adapter {key.name} is invalid: {reason}", "file")


def _needed(folder: Path) -> list[Path]:
    return [path for name in _NEEDED if (path := folder / name).exists()]


def _digest(folder: Path) -> bytes | None:
    """Of the files that say what the tokenizer is; None if there is none. Raises as `read` does."""
    if not _needed(folder):
        return None
    files = [path for path in sorted(folder.rglob("*")) if path.suffix not in _WEIGHTS]
    for path in files:
        if path.is_symlink() or (path.name in _NEEDED and not path.is_file()):
            raise AdapterInvalid(f"{path.name} is a link or a folder, a file is needed", "file")
        if path.name in _NEEDED and (size := path.stat().st_size) > _MAX_FILE_BYTES:
            raise AdapterInvalid(f"{path.name} has {size} bytes, {_MAX_FILE_BYTES} are allowed", "file")
    digest = hashlib.sha256()
    for path in files:
        if not path.is_file() or path.name in _OF_OTHERS:
            continue
        content = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                content.update(chunk)
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + content.digest())
    return digest.digest()
