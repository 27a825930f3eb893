"""What a configuration asks for: a plan of the tensors that its file must have, or may.

The names are those that PEFT's `save_pretrained` writes. Where it writes more than it reads again (the base
model's own embedding beside LoRA on it, a module beside the copy of it that was trained), that may be there.
"""

import copy
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import get_pattern_key

from worker.engine.adapters.adapter import Target
from worker.engine.adapters.plan import Plan, Role, Wanted
from worker.errors import AdapterInvalid

_PREFIX = "base_model.model."


def make_plan(config: LoraConfig, targets: Mapping[str, Target], max_lora_rank: int) -> Plan:
    """What `config` asks of a base model that has `targets`. Raises AdapterInvalid where it cannot be had."""
    plan = Plan(targets)
    targeted = _targeted(config, targets)
    if not targeted:
        what = f"target_modules {config.target_modules!r}"
        raise AdapterInvalid(f"{what} matches no module of the base model", "modules")
    for name in targeted:
        _want_pair(plan, config, name, max_lora_rank)
    saved = _want_saved(plan, config, targeted)
    tokens = _want_tokens(plan, config, {*targeted, *saved})
    if config.bias != "none":
        _want_biases(plan, targeted)
    if config.bias == "all":
        _want_other_biases(plan, {*targeted, *saved})
    for name, target in targets.items():
        if target.has_tokens and name not in {*targeted, *saved, *tokens}:
            _offer_own(plan, name, name)
    return plan


def _targeted(config: LoraConfig, targets: Mapping[str, Target]) -> list[str]:
    names = [name for name in targets if _is_targeted(config, name, targets[name])]
    given = config.target_modules
    if _ties(config, () if isinstance(given, str) else given or ()):
        names += [name for name in _tied(targets) if name not in names]
    return names


def _is_targeted(config: LoraConfig, name: str, target: Target) -> bool:
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        if target.in_features == 0 or target.is_head or target.is_embedding:
            return False
        config = copy.copy(config)
        config.target_modules = [name]  # what is left to ask are exclusions and layers
    return bool(check_target_module_exists(config, name))


def _ties(config: LoraConfig, names: Collection[str]) -> bool:
    """Whether PEFT does to both of two tied modules what it is told of one; it goes by their usual names."""
    named = any(name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in names)
    return bool(getattr(config, "ensure_weight_tying", False)) and named


def _tied(targets: Mapping[str, Target]) -> list[str]:
    return [name for name, target in targets.items() if target.is_tied]


def _want_pair(plan: Plan, config: LoraConfig, name: str, max_lora_rank: int) -> None:
    target = plan.targets[name]
    if target.refused:
        raise AdapterInvalid(f"module {name} cannot take LoRA here: {target.refused}", "modules")
    rank = _from_pattern(config.rank_pattern, name, config.r)
    if not 1 <= rank <= max_lora_rank:
        raise AdapterInvalid(
            f"rank {rank} of module {name} is not between 1 and max_lora_rank {max_lora_rank}", "rank"
        )
    alpha = _from_pattern(config.alpha_pattern, name, config.lora_alpha)
    plan.scalings[name] = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
    a, b = (
        ("lora_embedding_A", "lora_embedding_B")
        if target.is_embedding
        else ("lora_A.weight", "lora_B.weight")
    )
    path = f"{_PREFIX}{name}"
    read = 1 if target.is_input else None
    written = 0 if target.is_head else None
    plan.wanted[f"{path}.{a}"] = Wanted(name, Role.A, (rank, target.in_features), read)
    plan.wanted[f"{path}.{b}"] = Wanted(name, Role.B, (target.out_features, rank), written)
    if config.use_dora:
        magnitude = Wanted(name, Role.MAGNITUDE, (target.out_features,), written)
        plan.wanted[f"{path}.lora_magnitude_vector"] = magnitude
    if config.lora_bias:
        if target.is_embedding:
            raise AdapterInvalid(f"lora_bias is true, which module {name}, an embedding, cannot have")
        plan.wanted[f"{path}.lora_B.bias"] = Wanted(name, Role.BIAS, (target.out_features,), written)
    if target.has_tokens:
        _offer_own(plan, name, f"{name}.base_layer")


def _from_pattern(pattern: dict[str, float] | None, module: str, default: float) -> Any:
    pattern = pattern or {}
    return pattern.get(get_pattern_key(list(pattern), module), default)


def _offer_own(plan: Plan, name: str, path: str) -> None:
    """An embedding or head as a whole, which PEFT writes when tokens were added, or LoRA is on it."""
    target = plan.targets[name]
    for parameter in () if target.fixed else target.shapes:
        wanted = _parameter(plan, name, parameter)._replace(required=False)
        plan.wanted.setdefault(f"{_PREFIX}{path}.{parameter}", wanted)


def _parameter(plan: Plan, name: str, parameter: str) -> Wanted:
    target = plan.targets[name]
    if target.fixed:
        raise AdapterInvalid(f"module {name} cannot be replaced here: {target.fixed}", "modules")
    axis = 0 if target.has_tokens else None
    return Wanted(name, Role.PARAMETER, target.shapes[parameter], axis, parameter)


def _want_saved(plan: Plan, config: LoraConfig, targeted: Collection[str]) -> set[str]:
    """What `modules_to_save` names: by the end of the name, with all that is in it."""
    names = config.modules_to_save or ()
    roots = {}
    for leaf in plan.targets:
        found = [module for module in _ancestors(leaf) if any(module.endswith(name) for name in names)]
        if len(found) > 1:
            inside = f"{found[1]}, which is in {found[0]}"
            raise AdapterInvalid(f"modules_to_save names {inside}: one of them is enough", "modules")
        if found:
            roots[leaf] = found[0]
    if _ties(config, names):
        roots |= {name: name for name in _tied(plan.targets)}
    for leaf, root in roots.items():
        if leaf in targeted:
            said = "is named by target_modules and by modules_to_save: only one of them can be served"
            raise AdapterInvalid(f"module {leaf} {said}", "modules")
        for parameter in plan.targets[leaf].shapes:
            wanted = _parameter(plan, leaf, parameter)
            rest = f"{leaf}.{parameter}".removeprefix(f"{root}.")
            plan.wanted[f"{_PREFIX}{root}.{rest}"] = wanted
            for copied in ("original_module", "modules_to_save"):
                spare = wanted._replace(role=Role.SPARE, required=False)
                plan.wanted[f"{_PREFIX}{root}.{copied}.{rest}"] = spare
    plan.saved |= roots.keys()
    return set(roots)


def _ancestors(name: str) -> Iterator[str]:
    """`a`, `a.b` and `a.b.c` of `a.b.c`."""
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def _want_tokens(plan: Plan, config: LoraConfig, taken: Collection[str]) -> set[str]:
    """What `trainable_token_indices` names: rows of an embedding, and of a head that is tied to it."""
    given = config.trainable_token_indices
    if given is None:
        return set()
    inputs = [name for name, target in plan.targets.items() if target.is_input]
    if not isinstance(given, dict):
        given = dict.fromkeys(inputs, given)
    found = {}
    for ending, indices in given.items():
        names = [name for name in plan.targets if name.endswith(ending)]
        if not names:
            said = f"trainable_token_indices names {ending!r}, which matches no module of the base model"
            raise AdapterInvalid(said, "modules")
        found.update(dict.fromkeys(names, indices))
    tied = _tied(plan.targets) if any(plan.targets[name].is_tied for name in found) else []
    heads = [name for name in tied if not plan.targets[name].is_input]
    follows = bool(inputs) and inputs[0] in found and inputs[0] in tied
    for head in heads if follows else ():
        if found.get(head, found[inputs[0]]) == found[inputs[0]]:
            plan.tied[head] = inputs[0]
            found[head] = found[inputs[0]]
        elif config.ensure_weight_tying:
            said = "trainable_token_indices has different tokens for modules that share their weights"
            raise AdapterInvalid(f"{said}, and ensure_weight_tying is true", "modules")
    for name, indices in found.items():
        _want_tokens_of(plan, name, indices, taken)
    return set(found)


def _want_tokens_of(plan: Plan, name: str, indices: Sequence[int], taken: Collection[str]) -> None:
    target = plan.targets[name]
    if not (target.is_embedding or target.is_head):
        raise AdapterInvalid(
            f"trainable_token_indices names module {name}, which has no rows of tokens", "modules"
        )
    if target.fixed:
        raise AdapterInvalid(f"module {name} cannot be changed here: {target.fixed}", "modules")
    if "bias" in target.shapes:
        raise AdapterInvalid(f"trainable_token_indices names module {name}, which has a bias", "modules")
    if name in taken:
        said = "is named by trainable_token_indices and by target_modules or modules_to_save"
        raise AdapterInvalid(f"module {name} {said}: only one of them can be served", "modules")
    if not indices or len(set(indices)) < len(indices):
        raise AdapterInvalid(
            f"trainable_token_indices has no tokens, or one of them twice, for module {name}"
        )
    plan.tokens[name] = indices
    shape = (len(indices), target.shapes["weight"][1])
    role, required = (Role.SPARE, False) if name in plan.tied else (Role.TOKENS, True)
    path = f"{_PREFIX}{name}.token_adapter"
    plan.wanted[f"{path}.trainable_tokens_delta"] = Wanted(name, role, shape, required=required)
    if target.has_tokens:
        _offer_own(plan, name, f"{name}.token_adapter.base_layer")


def _want_biases(plan: Plan, targeted: Collection[str]) -> None:
    for name in targeted:
        if "bias" in plan.targets[name].shapes:
            plan.wanted[f"{_PREFIX}{name}.base_layer.bias"] = _parameter(plan, name, "bias")


def _want_other_biases(plan: Plan, done: Collection[str]) -> None:
    for name, target in plan.targets.items():
        if name not in done and "bias" in target.shapes:
            plan.wanted[f"{_PREFIX}{name}.bias"] = _parameter(plan, name, "bias")
