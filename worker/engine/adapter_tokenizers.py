"""Tokenizers that adapters bring along, each kind in memory once."""

import hashlib
import threading
import weakref
from collections import OrderedDict
from pathlib import Path

from transformers import AutoTokenizer

from worker.engine.tokenizer import Tokenizer
from worker.errors import AdapterInvalid
from worker.jobs import AdapterKey

_NEEDED = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""A folder with any of these has a tokenizer."""
_OTHERS = ("added_tokens.json", "chat_template.jinja", "merges.txt", "special_tokens_map.json")
_REMEMBERED = 64
"""Versions of adapters whose tokenizer stays in memory after its last use."""
_CHUNK_BYTES = 1 << 20


class AdapterTokenizers:
    """Reads the tokenizer in an adapter's folder. From any thread.

    Adapters are commonly saved with the tokenizer of their base model: folders with the same files share one,
    for as long as somebody uses it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[AdapterKey, Tokenizer | None] = OrderedDict()
        self._read: weakref.WeakValueDictionary[bytes, Tokenizer] = weakref.WeakValueDictionary()

    def of(self, key: AdapterKey, folder: Path) -> Tokenizer | None:
        """The tokenizer of an adapter's version, whose files never change; see `read`.

        AdapterInvalid names the adapter.
        """
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        try:
            found = self.read(folder)
        except AdapterInvalid as exc:
            raise AdapterInvalid(f"Adapter {key.name} is invalid: {exc}", exc.kind) from exc
        with self._lock:
            self._known[key] = found
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return found

    def read(self, folder: Path) -> Tokenizer | None:
        """The folder's tokenizer; None if there is none.

        No code of the folder is run. Raises AdapterInvalid if it cannot be read, and OSError.
        """
        files = [folder / name for name in (*_NEEDED, *_OTHERS) if (folder / name).exists()]
        if not any(file.name in _NEEDED for file in files):
            return None
        for file in files:
            if file.is_symlink() or not file.is_file():
                raise AdapterInvalid(f"{file.name} is a link or a folder, a file is needed", "file")
        digest = _digest(files)
        with self._lock:
            tokenizer = self._read.get(digest)
            if tokenizer is None:
                tokenizer = self._read[digest] = _load(folder)
            return tokenizer


def _load(folder: Path) -> Tokenizer:
    try:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        return Tokenizer(loaded, "the adapter's tokenizer")
    except MemoryError:
        raise
    except Exception as exc:  # an upload finds ways to make a library raise that nobody listed
        reason = " ".join(str(exc).split())[:500]
        raise AdapterInvalid(f"its tokenizer cannot be read: {type(exc).__name__}: {reason}", "file") from exc


def _digest(files: list[Path]) -> bytes:
    digest = hashlib.sha256()
    for path in files:
        content = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                content.update(chunk)
        digest.update(path.name.encode() + b"\0" + content.digest())
    return digest.digest()
