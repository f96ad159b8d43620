"""Names, options and defaults of the reference repositories and of earlier versions, translated to today's."""

from ldm.legacy.names import ALIASES, CLIP_WIDTHS, LIST_KEYS, NOT_SHIPPED_CLASS, OLD_MODULES
from ldm.legacy.sampling import sampling_options
from ldm.legacy.translation import (
    mend_indentation,
    old_params,
    old_prefixes,
    resolve_target,
    translate,
    translate_ddconfig,
)

__all__ = [
    "ALIASES",
    "CLIP_WIDTHS",
    "LIST_KEYS",
    "NOT_SHIPPED_CLASS",
    "OLD_MODULES",
    "mend_indentation",
    "old_params",
    "old_prefixes",
    "resolve_target",
    "sampling_options",
    "translate",
    "translate_ddconfig",
]
