"""The tensors that an adapter's file must have, or may, what each of them is, and whether a file has them."""

import enum
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from worker.engine.adapters.adapter import Target, Vocabulary
from worker.errors import AdapterInvalid


class Role(enum.Enum):
    """What a tensor is to its module."""

    A = "a"
    B = "b"
    BIAS = "bias of b"
    MAGNITUDE = "magnitude"
    PARAMETER = "parameter"
    """It stands for a parameter of the module's own."""
    TOKENS = "tokens"
    """It stands for some rows of the module's weight."""
    SPARE = "spare"
    """PEFT writes it and does without it."""


class Wanted(NamedTuple):
    """A tensor of the file."""

    module: str
    role: Role
    shape: tuple[int, ...]
    token_axis: int | None = None
    """Where it is larger by the tokens that an adapter brings."""
    parameter: str = ""
    """The parameter's name."""
    required: bool = True


class VocabularySizes(NamedTuple):
    """How many tokens an adapter may know."""

    extra: int
    """That it brings, at most."""
    least: int | None
    """Those of the base model's tokenizer: a model may have rows for more, which resizing takes away. None
    where it must be all rows."""


class Plan:
    """What all adapters with one configuration have in common."""

    def __init__(self, targets: Mapping[str, Target]) -> None:
        self.targets = targets
        self.wanted: dict[str, Wanted] = {}
        """By the tensor's name in the file."""
        self.scalings: dict[str, float] = {}
        """By module, what its B is multiplied by."""
        self.tokens: dict[str, Sequence[int]] = {}
        """By module, whose rows in the order of its tensor of role TOKENS."""
        self.tied: dict[str, str] = {}
        """Modules whose TOKENS are those of another, which is named."""
        self.saved: set[str] = set()
        """Modules that are replaced by trained copies."""

    @property
    def extra(self) -> str | None:
        """A tensor that is not A or B of a linear module that sees all tokens; None if none is wanted."""
        return next((name for name, own in self.wanted.items() if own.required and not self._adds(own)), None)

    def _adds(self, wanted: Wanted) -> bool:
        target = self.targets[wanted.module]
        return wanted.role in {Role.A, Role.B} and not target.is_head and not target.is_embedding

    def check(self, found: Mapping[str, tuple[int, ...]], sizes: VocabularySizes) -> Vocabulary | None:
        """Compare with the tensors that a file has, by name and shape.

        Returns what the adapter knows of tokens, None where that is what the base model does. Raises
        AdapterInvalid for the first tensor that is missing, left over, or of another shape.
        """
        tokens: dict[str, int] = {}
        for name, wanted in self.wanted.items():
            if name in found:
                self._check_shape(name, wanted, found[name], sizes, tokens)
            elif wanted.required:
                raise AdapterInvalid(f"tensor {name} is missing, though {_asking(wanted)}", "tensors")
        left_over = found.keys() - self.wanted.keys()
        if left_over:
            raise AdapterInvalid(
                f"tensor {min(left_over)} belongs to no module that target_modules names, nor to what the "
                "configuration asks for besides",
                "tensors",
            )
        return self._vocabulary(tokens)

    def _check_shape(
        self,
        name: str,
        wanted: Wanted,
        shape: tuple[int, ...],
        sizes: VocabularySizes,
        tokens: dict[str, int],
    ) -> None:
        needed = list(wanted.shape)
        axis = wanted.token_axis
        if axis is not None and len(shape) == len(needed):
            own = self.targets[wanted.module].num_tokens
            size = tokens.setdefault(wanted.module, shape[axis])
            if size > own + sizes.extra:
                raise AdapterInvalid(
                    f"tensor {name} brings {size - own} tokens beside the base model's {own}, the limit "
                    f"(lora_extra_vocab_size) is {sizes.extra}",
                    "tensors",
                )
            least = own if sizes.least is None else min(own, sizes.least)
            needed[axis] = size if size >= least else own
            if shape[axis] != size:
                said = f"is for {shape[axis]} tokens, another tensor of module {wanted.module} for {size}"
                raise AdapterInvalid(f"tensor {name} {said}", "tensors")
        if list(shape) != needed:
            message = f"tensor {name} has shape {list(shape)}, the base model needs {needed}"
            raise AdapterInvalid(message, "tensors")

    def _vocabulary(self, tokens: Mapping[str, int]) -> Vocabulary | None:
        ends = {name: target for name, target in self.targets.items() if target.has_tokens}
        if not ends:
            return None
        brought = {
            name: tokens.get(name, target.num_tokens) - target.num_tokens for name, target in ends.items()
        }
        shared = [
            name
            for name, target in ends.items()
            if target.is_tied and name in tokens and name not in self.saved
        ]
        if shared:  # what is new in one of them is in the other
            brought.update({name: brought[shared[0]] for name in ends if name not in tokens})
        if len(set(brought.values())) > 1:
            said = " and ".join(f"{ends[name].num_tokens + more} in {name}" for name, more in brought.items())
            raise AdapterInvalid(f"the adapter has {said}: as many tokens are needed in both", "tensors")
        for module, indices in self.tokens.items():
            target = self.targets[module]
            known = brought[module] + target.num_tokens if module in brought else target.in_features
            if max(indices) >= known:
                said = (
                    f"trainable_token_indices has {max(indices)} for module {module}, which has {known} rows"
                )
                raise AdapterInvalid(said, "tensors")
        if not any(brought.values()):
            return None
        if len(ends) < 2:
            raise AdapterInvalid("the adapter brings tokens, and the base model's head is no linear module")
        sizes_now = {target.is_head: target.num_tokens + brought[name] for name, target in ends.items()}
        return Vocabulary(reads=sizes_now[False], writes=sizes_now[True])


def _asking(wanted: Wanted) -> str:
    match wanted.role:
        case Role.A | Role.B:
            return "target_modules names its module"
        case Role.MAGNITUDE:
            return "use_dora is true"
        case Role.BIAS:
            return "lora_bias is true"
        case Role.TOKENS:
            return "trainable_token_indices names its module"
        case _:
            return "modules_to_save or bias asks for it"
