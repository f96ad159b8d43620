"""Stand-in for the data sets of reference configs that are not part of this package."""

from __future__ import annotations

from ldm.util import UserError


class NotShipped:
    """Data set that raises an error when its images are needed; models of such configs can still be built.

    Args:
        name: name of the data set in the config.
        instead: the class that reads such images in this package.

    Raises:
        UserError: always.
    """

    def __init__(self, name: str, instead: str) -> None:
        raise UserError(
            f"{name} does not come with this package, and its files are not published with the reference code either. "
            f"Use {instead}. Replace the target (and params) of data.params.train, validation or test that names it."
        )
