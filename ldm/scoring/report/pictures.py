"""Pictures of a run for its report: the newest of each kind, scaled down and written into the page."""

from __future__ import annotations

import base64
import io
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

logger = logging.getLogger(__name__)

MAX_SIDE = 1100  # pixels
MAX_PICTURES = 12
MAX_BYTES = 6_000_000  # of all pictures of a page, encoded
_STEP = re.compile(r"_gs-\d+_e-\d+_b-\d+$")
# what a reader wants first: edits, traversals and swaps, then samples and reconstructions
_ORDER = ("edit", "travers", "swap", "attention", "names", "sample", "reconstruct", "input")
_PLACES = ("images/*/*.png", "edit_score/*.png", "unit_names/*.png", "*.png")


@dataclass(frozen=True)
class Picture:
    """A picture of a page.

    Attributes:
        title: what it is, from its file's name.
        data: its ``data:`` address.
        width: pixels as it is shown.
        height: likewise.
    """

    title: str
    data: str
    width: int
    height: int


def run_pictures(run_dir: Path, limit: int = MAX_PICTURES, max_side: int = MAX_SIDE) -> list[Picture]:
    """The newest picture of each kind (images/<split>/<kind>, edit scores, curves), the telling ones first."""
    newest: dict[str, Path] = {}
    for pattern in _PLACES:
        for path in run_dir.glob(pattern):
            kind = _STEP.sub("", path.stem)
            key = f"{path.parent.name} {path.parent.name if kind.isdigit() else kind}"
            if key not in newest or path.stat().st_mtime_ns > newest[key].stat().st_mtime_ns:
                newest[key] = path
    pictures: list[Picture] = []
    room = MAX_BYTES
    for path in sorted(newest.values(), key=lambda path: (_place(path), str(path))):
        picture = encode_picture(path, path.relative_to(run_dir).as_posix(), max_side)
        if picture is not None and len(pictures) < limit and len(picture.data) <= room:
            pictures.append(picture)
            room -= len(picture.data)
    return pictures


def _place(path: Path) -> int:
    text = f"{path.parent.name}/{path.name}"
    return next((place for place, word in enumerate(_ORDER) if word in text), len(_ORDER))


def encode_picture(path: Path, title: str, max_side: int = MAX_SIDE) -> Picture | None:
    """Read a picture, scaled down if need be; None, and a warning, for a file that is none."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, UnidentifiedImageError) as err:
        logger.warning("%s is left out of the report: %s", path, err)
        return None
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    best = min((_encoded(image, kind) for kind in ("PNG", "JPEG")), key=lambda found: len(found[1]))
    kind, content = best
    data = f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode('ascii')}"
    return Picture(title, data, image.width, image.height)


def _encoded(image: Image.Image, kind: str) -> tuple[str, bytes]:
    stream = io.BytesIO()
    image.save(stream, kind, optimize=True, **({"quality": 88} if kind == "JPEG" else {}))
    return kind, stream.getvalue()
