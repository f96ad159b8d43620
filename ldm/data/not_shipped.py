"""What stands for a data set that older configs name and nobody ships."""

from __future__ import annotations

from ldm.util import UserError


class NotShipped:
    """Says what to use instead, once somebody asks for its images; a config that names it builds its model.

    Args:
        name: the data set as the config names it.
        instead: which class reads such images here.

    Raises:
        UserError: always.
    """

    def __init__(self, name: str, instead: str) -> None:
        raise UserError(
            f"the data set {name} does not come with this package; its files and their lists are not published with "
            f"the reference code either. Put your images into {instead}. In the config, replace the target (and "
            "params) of data.params.train, validation or test that names it"
        )
