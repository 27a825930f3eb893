"""What adapters must fit, left beside them for mirrors here and in other processes."""

import logging
import os
from collections.abc import Mapping

from adapters_sync.layout import BaseModel as AdapterBase
from adapters_sync.layout import MirrorPaths, write_base_model
from worker.engine.adapters.adapter import Target
from worker.engine.base_model import load_outline
from worker.engine.discovery import foresee
from worker.settings import Settings

logger = logging.getLogger(__name__)


def tell_mirrors_beforehand(settings: Settings, weights: str) -> None:
    """As `tell_mirrors`, from the configuration of the model in `weights` alone. Raises ModelError."""
    outline = load_outline(weights, trust_remote_code=settings.trust_remote_code)
    tell_mirrors(settings, foresee(outline))


def tell_mirrors(settings: Settings, targets: Mapping[str, Target]) -> None:
    """Leave word beside the adapters of what they must fit, for mirrors here and in other processes."""
    folder = settings.adapters_path if settings.lora_enabled else None
    if folder is None:
        return
    paths = MirrorPaths(folder.resolve())
    place = paths.base_model_file.parent
    told = AdapterBase(
        modules={
            name: (one.in_features, one.out_features)
            for name, one in targets.items()
            if not one.refused and not one.is_embedding
        },
        refused={name: one.refused for name, one in targets.items() if one.refused},
        max_lora_rank=settings.max_lora_rank,
        vocabularies={
            name: (one.num_tokens, one.in_features if one.is_head else one.out_features)
            for name, one in targets.items()
            if one.has_tokens and not one.fixed
        },
        lora_extra_vocab_size=settings.lora_extra_vocab_size,
    )
    try:
        if settings.sync:
            place.mkdir(parents=True, exist_ok=True)  # no pass has made it before the first
        if os.access(place, os.W_OK):  # else no mirror writes there either
            write_base_model(paths, told)
    except OSError as error:
        logger.warning("cannot tell mirrors what adapters must fit", extra={"reason": str(error)})
