"""Names, options and habits of the reference repositories and of earlier versions, in today's words."""

from ldm.legacy.translation import ALIASES, OLD_MODULES, mend_indentation, resolve_target, translate

__all__ = ["ALIASES", "OLD_MODULES", "mend_indentation", "resolve_target", "translate"]
