"""Pictures of a run for its report: the newest of each kind, scaled down and embedded in the page."""

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
# words in file names, in the order of the pictures: edits, traversals and swaps first
_ORDER = ("edit", "travers", "swap", "attention", "names", "sample", "reconstruct", "input")
_PATTERNS = ("images/*/*.png", "edit_score/*.png", "unit_names/*.png", "*.png")


@dataclass(frozen=True)
class Picture:
    """A picture with its ``data:`` address and its size in pixels."""

    title: str
    data: str
    width: int
    height: int


def run_pictures(run_dir: Path, limit: int = MAX_PICTURES, max_side: int = MAX_SIDE) -> list[Picture]:
    """Return the newest picture of each kind (images/<split>/<kind>, edit scores, curves)."""
    newest: dict[str, Path] = {}
    for pattern in _PATTERNS:
        for path in run_dir.glob(pattern):
            kind = _STEP.sub("", path.stem)
            key = f"{path.parent.name} {path.parent.name if kind.isdigit() else kind}"
            if key not in newest or path.stat().st_mtime_ns > newest[key].stat().st_mtime_ns:
                newest[key] = path
    pictures: list[Picture] = []
    bytes_left = MAX_BYTES
    for path in sorted(newest.values(), key=lambda path: (_position(path), str(path))):
        if len(pictures) == limit:
            break
        picture = encode_picture(path, path.relative_to(run_dir).as_posix(), max_side)
        if picture is not None and len(picture.data) <= bytes_left:
            pictures.append(picture)
            bytes_left -= len(picture.data)
    return pictures


def _position(path: Path) -> int:
    text = f"{path.parent.name}/{path.name}"
    return next((position for position, word in enumerate(_ORDER) if word in text), len(_ORDER))


def encode_picture(path: Path, title: str, max_side: int = MAX_SIDE) -> Picture | None:
    """Read a picture and scale it down; log a warning and return None if the file is not a picture."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        logger.warning("%s: left out of the report. %s", path, error)
        return None
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    kind, content = min((_encoded(image, kind) for kind in ("PNG", "JPEG")), key=lambda found: len(found[1]))
    data = f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode('ascii')}"
    return Picture(title, data, image.width, image.height)


def _encoded(image: Image.Image, kind: str) -> tuple[str, bytes]:
    stream = io.BytesIO()
    image.save(stream, kind, optimize=True, **({"quality": 88} if kind == "JPEG" else {}))
    return kind, stream.getvalue()
