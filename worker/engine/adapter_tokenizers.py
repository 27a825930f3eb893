"""Tokenizers that adapters bring along, each kind in memory once."""

import hashlib
import threading
import weakref
from collections import OrderedDict
from pathlib import Path

from transformers import AutoTokenizer

from worker.engine.adapter_config import CONFIG_FILE
from worker.engine.tokenizer import Tokenizer
from worker.errors import AdapterInvalid
from worker.jobs import AdapterKey

_NEEDED = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""A folder with any of these has a tokenizer."""
_WEIGHTS = frozenset({".bin", ".gguf", ".md", ".pt", ".pth", ".safetensors"})
"""Ends of files that say nothing about it. All else may: a tokenizer's code reads files of many names."""
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
        if not any((folder / name).exists() for name in _NEEDED):
            return None
        files = [path for path in sorted(folder.rglob("*")) if path.suffix not in _WEIGHTS]
        for path in files:
            if path.is_symlink() or (path.name in _NEEDED and not path.is_file()):
                raise AdapterInvalid(f"{path.name} is a link or a folder, a file is needed", "file")
        files = [path for path in files if path.is_file() and path.name != CONFIG_FILE]
        digest = _digest(folder, files)
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
        if isinstance(exc, OSError) and exc.errno is not None:  # the disk's; transformers' own have none
            raise
        reason = " ".join(str(exc).split())[:500]
        raise AdapterInvalid(f"its tokenizer cannot be read: {type(exc).__name__}: {reason}", "file") from exc


def _digest(folder: Path, files: list[Path]) -> bytes:
    digest = hashlib.sha256()
    for path in files:
        content = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                content.update(chunk)
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + content.digest())
    return digest.digest()
