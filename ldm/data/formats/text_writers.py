"""Writing pictures with attribute texts: an LMDB, or its twin in HDF5."""

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

from ldm.data.formats.h5_files import write_h5
from ldm.data.formats.lmdb_reader import import_lmdb
from ldm.data.formats.picture_files import square, to_array
from ldm.util import UserError

SEPARATOR = "|"
_SAMPLES_PER_TRANSACTION = 500
_SAMPLES_PER_BLOCK = 256
Sample = tuple[Image.Image | np.ndarray, Sequence[str] | None]


def write_text_lmdb(
    path: str | os.PathLike,
    samples: Iterable[Sample],
    resolution: int = 128,
    image_format: str = "PNG",
    on_progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Write pictures with their attributes; the LMDB appears under its name only when it is whole.

    Args:
        path: of the LMDB folder; must not exist.
        samples: pictures (PIL, or (H, W, 3) uint8) with their U texts, "" where an attribute is unknown; None in place
            of the texts for pictures alone.
        resolution: side to which pictures are brought.
        image_format: "PNG" or "JPEG".
        on_progress: called with the number of pictures written so far.

    Returns:
        The number of pictures.

    Raises:
        UserError: ``path`` exists, no samples, texts that cannot be stored, or no space.
    """
    lmdb = import_lmdb()
    target = _new(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        with lmdb.open(str(temporary), map_size=2**26) as environment:
            count = _write_samples(environment, samples, resolution, image_format, on_progress)
        if not count:
            raise UserError(f"{target}: no pictures to write")
        os.replace(temporary, target)
    except (OSError, lmdb.Error) as err:
        raise UserError(f"{target} could not be written ({err}); free some space or choose another place") from err
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return count


def write_text_h5(
    path: str | os.PathLike,
    samples: Iterable[Sample],
    count: int,
    resolution: int = 128,
    on_progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Write the twin of the LMDB: ``images``, ``texts`` joined by ``|``, and the attribute ``length``.

    Args:
        path: of the file; must not exist.
        samples: see ``write_text_lmdb``.
        count: number of samples.
        resolution: side to which pictures are brought.
        on_progress: called with the number of pictures written so far.

    Returns:
        The number of pictures.

    Raises:
        UserError: ``path`` exists, no samples, texts that cannot be stored, or no space.
    """
    target = _new(path)
    if not count:
        raise UserError(f"{target}: no pictures to write")
    texts: list[str | None] = []

    def blocks() -> Iterator[np.ndarray]:
        checked = _checked(samples)
        while part := [*itertools.islice(checked, _SAMPLES_PER_BLOCK)]:
            texts.extend(text for _, text in part)
            yield np.stack([to_array(_brought_to(picture, resolution)) for picture, _ in part])

    def arrays() -> dict[str, np.ndarray]:
        return {} if texts[0] is None else {"texts": np.array(texts, dtype=object)}

    write_h5(target, (count, resolution, resolution, 3), blocks(), arrays, {"length": count}, on_progress)
    return count


def _new(path: str | os.PathLike) -> Path:
    target = Path(path)
    if target.exists():
        raise UserError(f"{target} exists already; remove it or choose another name")
    return target


def _write_samples(
    environment: Any, samples: Iterable[Sample], resolution: int, image_format: str, on_progress: Callable[[int], None]
) -> int:
    count, pending = 0, []
    for picture, text in _checked(samples):
        name = f"{resolution}-{str(count).zfill(7)}"
        pending.append((f"img-{name}", _encode(picture, resolution, image_format)))
        if text is not None:
            pending.append((f"txt-{name}", text.encode("utf-8")))
        count += 1
        if count % _SAMPLES_PER_TRANSACTION == 0:
            _put(environment, pending)
            pending = []
            on_progress(count)
    _put(environment, [*pending, ("length", str(count).encode())])
    on_progress(count)
    return count


def _checked(samples: Iterable[Sample]) -> Iterator[tuple[Image.Image | np.ndarray, str | None]]:
    """Each picture with its texts joined to one string, after a look at them."""
    first = None
    for index, (picture, texts) in enumerate(samples):
        width = None if texts is None else len(texts)
        first = width if index == 0 else first
        if width != first:
            raise UserError(
                f"picture {index} has {width or 'no'} attributes, the ones before have {first or 'none'}; "
                "give every picture as many (an empty one where it is unknown)"
            )
        for text in texts or ():
            if SEPARATOR in text:
                raise UserError(
                    f"picture {index}: attribute {text!r} contains {SEPARATOR!r}, which separates "
                    "attributes; use another sign"
                )
        yield picture, None if texts is None else SEPARATOR.join(texts)


def _encode(picture: Image.Image | np.ndarray, resolution: int, image_format: str) -> bytes:
    stream = io.BytesIO()
    _brought_to(picture, resolution).save(stream, format=image_format, quality=95)
    return stream.getvalue()


def _brought_to(picture: Image.Image | np.ndarray, resolution: int) -> Image.Image:
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    return square(picture.convert("RGB"), resolution)


def _put(environment: Any, pairs: list[tuple[str, bytes]]) -> None:
    """Write all pairs in one transaction, doubling the map as often as it proves too small."""
    while True:
        try:
            with environment.begin(write=True) as transaction:
                for key, value in pairs:
                    transaction.put(key.encode(), value)
            return
        except import_lmdb().MapFullError:
            environment.set_mapsize(environment.info()["map_size"] * 2)
