"""Writing of images with attribute texts, as an LMDB or in HDF5."""

from __future__ import annotations

import io
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.formats.lmdb_reader import import_lmdb
from ldm.data.formats.picture_files import square, to_array
from ldm.data.formats.texts import SEPARATOR
from ldm.data.paths import AnyPath
from ldm.data.rows import write_h5
from ldm.util import UserError

_SAMPLES_PER_BLOCK = 256
Sample = tuple[Image.Image | np.ndarray, Sequence[str] | None]


def write_text_lmdb(
    path: AnyPath,
    samples: Iterable[Sample],
    resolution: int = 128,
    image_format: str = "PNG",
    on_progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Write an LMDB of images with their attributes, atomically.

    Args:
        path: folder of the LMDB; must not exist.
        samples: images (PIL, or (H, W, 3) uint8) with their U texts, "" for an unknown attribute; None in place of the
            texts for images without texts.
        resolution: side of the stored images in pixels.
        image_format: "PNG" or "JPEG".
        on_progress: called with the number of images written so far.

    Returns:
        The number of images.

    Raises:
        UserError: ``path`` exists, there are no samples, texts cannot be stored, or the disk is full.
    """
    lmdb = import_lmdb()
    target = _new(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        with lmdb.open(str(temporary), map_size=2**26) as environment:
            count = _write_samples(environment, samples, resolution, image_format, on_progress)
        if not count:
            raise UserError(f"{target}: expected at least one image to write, got none.")
        os.replace(temporary, target)
    except (OSError, lmdb.Error) as error:
        raise UserError(f"{target} could not be written ({error}). Free disk space, or use another folder.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return count


def write_text_h5(
    path: AnyPath,
    samples: Iterable[Sample],
    count: int,
    resolution: int = 128,
    on_progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Write ``count`` samples in HDF5: ``images``, ``texts`` joined by ``|``, and the attribute ``length``.

    For the other arguments, the result and errors see ``write_text_lmdb``.
    """
    target = _new(path)
    if not count:
        raise UserError(f"{target}: expected at least one image to write, got none.")
    texts: list[str | None] = []

    def blocks() -> Iterator[np.ndarray]:
        for part in _blocks(samples, resolution):
            texts.extend(text for _, text in part)
            yield np.stack([to_array(image) for image, _ in part])

    def arrays() -> dict[str, np.ndarray]:
        return {} if texts[0] is None else {"texts": np.array(texts, dtype=object)}

    write_h5(target, (count, resolution, resolution, 3), blocks(), arrays, {"length": count}, on_progress)
    return count


def _new(path: AnyPath) -> Path:
    target = Path(path)
    if target.exists():
        raise UserError(f"{target} exists already. Remove it, or choose another name.")
    return target


def _write_samples(
    environment: Any, samples: Iterable[Sample], resolution: int, image_format: str, on_progress: Callable[[int], None]
) -> int:
    count = 0
    for part in _blocks(samples, resolution):
        pairs = []
        for number, (image, text) in enumerate(part, start=count):
            name = f"{resolution}-{str(number).zfill(7)}"
            stream = io.BytesIO()
            image.save(stream, format=image_format, quality=95)
            pairs.append((f"img-{name}", stream.getvalue()))
            if text is not None:
                pairs.append((f"txt-{name}", text.encode("utf-8")))
        count += len(part)
        _put(environment, [*pairs, ("length", str(count).encode())])
        on_progress(count)
    return count


def _blocks(samples: Iterable[Sample], resolution: int) -> Iterator[list[tuple[Image.Image, str | None]]]:
    prepared = _prepared(samples, resolution)
    while part := [*itertools.islice(prepared, _SAMPLES_PER_BLOCK)]:
        yield part


def _prepared(samples: Iterable[Sample], resolution: int) -> Iterator[tuple[Image.Image, str | None]]:
    """Yield each image in its final size, with its texts joined to one string; check the texts."""
    first = None
    for index, (image, texts) in enumerate(samples):
        width = None if texts is None else len(texts)
        first = width if index == 0 else first
        if width != first:
            raise UserError(
                f"image {index}: expected {first or 'no'} attributes, as for the images before it, got "
                f"{width or 'none'}. Give every image the same number (an empty one if it is unknown)."
            )
        for text in texts or ():
            if SEPARATOR in text:
                raise UserError(
                    f"image {index}: attribute {text!r} contains {SEPARATOR!r}, which separates attributes. Replace it."
                )
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        yield square(picture.convert("RGB"), resolution), None if texts is None else SEPARATOR.join(texts)


def _put(environment: Any, pairs: list[tuple[str, bytes]]) -> None:
    """Write all pairs in one transaction; double the size of the map while it is too small."""
    while True:
        try:
            with environment.begin(write=True) as transaction:
                for key, value in pairs:
                    transaction.put(key.encode(), value)
            return
        except import_lmdb().MapFullError:
            environment.set_mapsize(environment.info()["map_size"] * 2)
