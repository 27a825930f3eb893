"""`.base_model.json`: what the base model lets adapters apply to. The worker writes it, the mirror reads it.

Only who has loaded the model knows its modules. With them in a file beside the adapters, an upload for
another model is refused before it takes the place of a version that works. Without the file the mirror
checks what it can check alone.
"""

import logging
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec

from adapters_sync.errors import InvalidAdapter
from adapters_sync.header import TensorInfo
from adapters_sync.names import shown
from adapters_sync.paths import MirrorPaths

_logger = logging.getLogger(__name__)
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight", re.DOTALL)
"""PEFT's name of a LoRA weight. Tensors with names that are none of these are for the worker to judge."""
_EMBEDDING_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_embedding_(?P<side>[AB])", re.DOTALL)
_WHOLE_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>.+?)"
    r"(\.base_layer|\.token_adapter\.base_layer|\.modules_to_save|\.original_module)?\.weight",
    re.DOTALL,
)
"""An embedding or a head, as PEFT writes it when tokens were added or it was trained as a whole."""


class BaseModel(msgspec.Struct, frozen=True, kw_only=True):
    """The whole file."""

    modules: Mapping[str, tuple[int, int]]
    """Features in and out of every module that can take LoRA, by name."""
    refused: Mapping[str, str] = {}
    """Why a module cannot take it, by name."""
    max_lora_rank: int | None = None
    """The largest rank that is served."""
    vocabularies: Mapping[str, tuple[int, int]] = {}
    """Tokens and features of every module whose weight has a row for each token, by name."""
    lora_extra_vocab_size: int | None = None
    """Tokens that an adapter may bring."""

    def check(self, tensors: Mapping[str, TensorInfo]) -> None:
        """Raise InvalidAdapter for the first tensor, by name, that this model has no place for.

        Looked at are LoRA weights, and embeddings and heads, which may have rows for tokens of the adapter's.
        """
        for name, tensor in sorted(tensors.items()):
            if found := _TENSOR.fullmatch(name):
                self._check(name, tensor.shape, found["module"], found["side"])
            elif found := _EMBEDDING_TENSOR.fullmatch(name):
                self._check_embedding(name, tensor.shape, found["module"], found["side"])
            elif (found := _WHOLE_TENSOR.fullmatch(name)) and found["module"] in self.vocabularies:
                tokens, features = self.vocabularies[found["module"]]
                self._check_tokens(name, tensor.shape, 0, tokens)
                self._check_shape(name, tensor.shape, (None, features), f"[{tokens}, {features}]")

    def _check(self, tensor: str, shape: tuple[int, ...], module: str, side: str) -> None:
        if module in self.refused:
            raise InvalidAdapter(f"module {shown(module)} cannot take LoRA: {self.refused[module]}")
        if module not in self.modules:
            raise InvalidAdapter(f"tensor {shown(tensor)} is for a module that the base model does not have")
        features_in, features_out = self.modules[module]
        if side == "A":
            self._check_shape(tensor, shape, (None, features_in), f"[rank, {features_in}]")
        elif module in self.vocabularies:
            self._check_tokens(tensor, shape, 0, features_out)
            self._check_shape(tensor, shape, (None, None), f"[{features_out}, rank]")
        else:
            self._check_shape(tensor, shape, (features_out, None), f"[{features_out}, rank]")

    def _check_embedding(self, tensor: str, shape: tuple[int, ...], module: str, side: str) -> None:
        if module not in self.vocabularies:
            return  # the worker knows more kinds of embeddings
        tokens, features = self.vocabularies[module]
        if side == "A":
            self._check_tokens(tensor, shape, 1, tokens)
            self._check_shape(tensor, shape, (None, None), f"[rank, {tokens}]")
        else:
            self._check_shape(tensor, shape, (features, None), f"[{features}, rank]")

    def _check_tokens(self, tensor: str, shape: tuple[int, ...], axis: int, tokens: int) -> None:
        """An adapter has a few more than the base model at most; how few it may have the worker knows."""
        if len(shape) != 2:
            return  # which its shape is refused for
        brought, limit = shape[axis] - tokens, self.lora_extra_vocab_size
        if limit is not None and brought > limit:
            raise InvalidAdapter(f"tensor {shown(tensor)} brings {brought} tokens; the limit is {limit}")

    @staticmethod
    def _check_shape(
        tensor: str, shape: tuple[int, ...], expected: tuple[int | None, int | None], needed: str
    ) -> None:
        pairs = zip(shape, expected, strict=False)
        if len(shape) != 2 or any(size not in {own, None} for own, size in pairs):
            raise InvalidAdapter(
                f"tensor {shown(tensor)} has shape {list(shape)}; the base model needs {needed}"
            )


class BaseModelFile:
    """The file for who asks again and again: each look is a stat, and a read only after a change."""

    def __init__(self, paths: MirrorPaths) -> None:
        self._path = paths.base_model_file
        self._stamp: tuple[int, int, int] | None = None
        self.model: BaseModel | None = None
        """As last looked at; None while there is no such file, or none that can be read."""

    def look(self) -> bool:
        """Bring `model` up to date; True when it is another one now. Blocking."""
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return False
        before, self.model, self._stamp = self.model, _read(self._path), stamp
        return self.model != before

    def _stamp_now(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size


def write_base_model(paths: MirrorPaths, model: BaseModel) -> None:
    """Say what adapters can apply to, in one step for every reader. Blocking; raises OSError.

    A file that says so already stays as it is, so a restart makes no mirror judge anything anew.
    """
    path = paths.base_model_file
    if _read(path) == model:
        return
    descriptor, fresh = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123 (a descriptor, not a path)
            os.fchmod(descriptor, 0o644)
            file.write(msgspec.json.encode(model) + b"\n")
            file.flush()
            os.fsync(descriptor)
        Path(fresh).replace(path)
    except BaseException:
        Path(fresh).unlink(missing_ok=True)
        raise


def _read(path: Path) -> BaseModel | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=BaseModel)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        _logger.warning("cannot read what the base model is", extra={"path": str(path), "reason": str(error)})
        return None
