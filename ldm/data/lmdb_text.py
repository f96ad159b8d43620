"""Pictures, with or without attribute texts, in an LMDB.

Keys: ``length`` (a number in ASCII); ``img-<resolution>-<index>`` an encoded picture (older sets: without
``img-``); ``txt-<resolution>-<index>`` its attributes in UTF-8, joined by ``|``. Indices have seven digits.
"""

from __future__ import annotations

import io
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ldm.data.picture_files import crop_face, decode_picture, square, to_array
from ldm.util import ConfigError, UserError

SEPARATOR = "|"
_SAMPLES_PER_TRANSACTION = 500


def _lmdb() -> Any:
    try:
        import lmdb
    except ModuleNotFoundError as err:
        raise UserError("LMDB data sets need the package lmdb: pip install 'clip-disdiff[lmdb]' "
                        "(or pip install lmdb)") from err
    return lmdb


_environments: dict[str, Any] = {}
_environments_lock = threading.RLock()


def _close_before_fork() -> None:
    """lmdb opens a file only once per process and counts a forked child as the same one: so none stays open
    while worker processes are started; each process opens its own when it reads next."""
    _environments_lock.acquire()
    for environment in _environments.values():
        environment.close()
    _environments.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_close_before_fork, after_in_parent=_environments_lock.release,
                        after_in_child=_environments_lock.release)


def _environment(path: str) -> Any:
    """The LMDB at ``path``, shared by all readers of this process; to be called under the lock."""
    if path not in _environments:
        _environments[path] = _open_checked(path)
    return _environments[path]


def _open_checked(path: str) -> Any:
    lmdb = _lmdb()
    folder = os.path.isdir(path)
    try:
        environment = lmdb.open(path, subdir=folder, readonly=True, lock=False, readahead=False, meminit=False,
                                max_readers=32)
    except lmdb.Error as err:
        raise UserError(f"{path} cannot be opened as LMDB ({err}); set path: (or the environment variable "
                        "DB_PATH) to an LMDB such as scripts/make_lmdb.py writes") from err
    found = os.path.getsize(os.path.join(path, "data.mdb") if folder else path)
    expected = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if found < expected:  # reading beyond the end of a mapped file would kill the process without a word
        environment.close()
        raise UserError(f"{path} has {found} bytes, expected at least {expected}: it is truncated. Copy or write "
                        "it anew")
    return environment


class LMDBReader:
    """Reads the keys of one LMDB; may be sent to worker processes.

    Args:
        path: folder or file of the LMDB.
        resolution: as in the keys; None where they say ``None``.
        zfill: digits of the index in the keys.
    """

    def __init__(self, path: str | os.PathLike, resolution: int | None, zfill: int = 7) -> None:
        self.path, self.resolution, self.zfill = os.path.abspath(path), resolution, zfill

    def get(self, key: str) -> bytes | None:
        """The value of ``key``, None where it is missing."""
        lmdb = _lmdb()
        try:
            with _environments_lock, _environment(self.path).begin(write=False) as transaction:
                return transaction.get(key.encode())
        except lmdb.Error as err:
            raise UserError(f"{self.path}: key {key!r} cannot be read ({err}); the LMDB is damaged, write it "
                            "anew") from err

    def require(self, *keys: str) -> bytes:
        """The value of the first of ``keys`` that exists.

        Raises:
            UserError: none of them does.
        """
        for key in keys:
            value = self.get(key)
            if value is not None:
                return value
        named = " nor ".join(repr(key) for key in keys)
        raise UserError(f"{self.path} has no key {named}; check original_resolution (now {self.resolution}) and "
                        "that the LMDB was written to its end")

    def __len__(self) -> int:
        value = self.require("length")
        try:
            return int(value)
        except ValueError as err:
            raise UserError(f"{self.path}: key 'length' holds {value[:40]!r}, expected a number") from err

    def name(self, index: int) -> str:
        """``<resolution>-<index>``, the common part of an image's keys."""
        return f"{self.resolution}-{str(index).zfill(self.zfill)}"


class LMDBImages(Dataset):
    """Pictures of an LMDB, without text: the target for first stages on one's own pictures.

    Args:
        path: the LMDB; None takes the environment variable ``DB_PATH``, else ./data/example.lmdb.
        image_size: side of the images in pixels: shorter side resized, centre cut out.
        original_resolution: as in the keys.
        crop_d2c: cut the CelebA face window first (only for unresized 178 x 218 pictures).
        zfill: digits of the index in the keys.

    Items: ``image`` (H, W, 3) uint8 and ``index`` int.

    Raises:
        UserError: no LMDB, a missing key or a damaged picture, named.
    """

    space = None
    vocabulary = None
    _prefixes: tuple[str, ...] = ("", "img-")

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        image_size: int = 64,
        original_resolution: int | None = 128,
        crop_d2c: bool = False,
        zfill: int = 7,
    ) -> None:
        if image_size < 1:
            raise ConfigError(f"image_size must be a number of pixels, found {image_size}")
        path = path or os.environ.get("DB_PATH") or "./data/example.lmdb"
        self.reader = LMDBReader(path, original_resolution, zfill)
        self.image_size, self.crop_d2c = image_size, crop_d2c
        self._length = len(self.reader)

    def __len__(self) -> int:
        return self._length

    def picture(self, index: int) -> np.ndarray:
        """Image ``index``: (image_size, image_size, 3) uint8."""
        keys = [prefix + self.reader.name(index) for prefix in self._prefixes]
        name = f"{self.reader.path}: picture {keys[0]!r}"
        picture = decode_picture(self.reader.require(*keys), name)
        if self.crop_d2c:
            picture = crop_face(picture, name)
        return to_array(square(picture, self.image_size))

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {self.reader.path} with {len(self)} pictures")
        return {"image": torch.from_numpy(self.picture(index)), "index": index}


class LMDBTextImages(LMDBImages):
    """Pictures with attribute texts (``LMDBImages`` and, in each item, ``text``: U strings).

    Args:
        num_attributes: U, which must be the model's number of units; None takes that of the first picture.
        unset_prob: probability that a text is left empty, unit by unit.
        seed: of that choice, which depends on it and on the indices of the batch alone.

    Raises:
        UserError: a picture with another number of attributes, or texts that are not UTF-8.
    """

    _prefixes = ("img-", "")

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        image_size: int = 64,
        original_resolution: int | None = 128,
        crop_d2c: bool = False,
        zfill: int = 7,
        num_attributes: int | None = None,
        unset_prob: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(path, image_size, original_resolution, crop_d2c, zfill)
        if not 0.0 <= unset_prob <= 1.0:
            raise ConfigError(f"unset_prob is a probability in [0, 1], found {unset_prob}")
        self.unset_prob, self.seed = unset_prob, seed
        self.num_attributes = num_attributes
        if num_attributes is None and len(self):
            self.num_attributes = len(self.texts(0))
        elif len(self):
            self.texts(0)  # tell at once, not after hours

    def texts(self, index: int) -> list[str]:
        """The U attribute texts of image ``index``."""
        key = f"txt-{self.reader.name(index)}"
        try:
            texts = self.reader.require(key).decode("utf-8").split(SEPARATOR)
        except UnicodeDecodeError as err:
            raise UserError(f"{self.reader.path}: key {key!r} is not UTF-8 ({err}); write it anew") from err
        if self.num_attributes is not None and len(texts) != self.num_attributes:
            raise UserError(f"{self.reader.path}: picture {index} has {len(texts)} attributes "
                            f"({SEPARATOR.join(texts)!r}), expected {self.num_attributes}; set num_attributes and the "
                            "model's latent_unit to the number written, or write the LMDB anew (leave unknown ones "
                            "empty)")
        return texts

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        items = [super(LMDBTextImages, self).__getitem__(index) | {"text": self.texts(index)} for index in indices]
        if self.unset_prob:
            rng = np.random.default_rng([self.seed, *indices])
            unset = rng.random((len(items), self.num_attributes)) < self.unset_prob
            for item, row in zip(items, unset.tolist()):
                item["text"] = ["" if gone else text for text, gone in zip(item["text"], row)]
        return items


def write_text_lmdb(
    path: str | os.PathLike,
    samples: Iterable[tuple[Image.Image | np.ndarray, Sequence[str]]],
    resolution: int = 128,
    image_format: str = "PNG",
    on_progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Write pictures with their attributes; the LMDB appears under its name only when it is whole.

    Args:
        path: of the LMDB folder; must not exist.
        samples: pictures (PIL, or (H, W, 3) uint8) with their U texts; "" where an attribute is unknown.
        resolution: side to which pictures are brought.
        image_format: "PNG" or "JPEG".
        on_progress: called with the number of pictures written so far.

    Returns:
        The number of pictures.

    Raises:
        UserError: ``path`` exists, no samples, texts that cannot be stored, or no space.
    """
    lmdb = _lmdb()
    target = Path(path)
    if target.exists():
        raise UserError(f"{target} exists already; remove it or choose another name")
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


def _write_samples(environment: Any, samples: Iterable, resolution: int, image_format: str,
                   on_progress: Callable[[int], None]) -> int:
    count, width, pending = 0, None, []
    for picture, texts in samples:
        width = len(texts) if width is None else width
        _check_texts(count, texts, width)
        name = f"{resolution}-{str(count).zfill(7)}"
        pending += [(f"img-{name}", _encode(picture, resolution, image_format)),
                    (f"txt-{name}", SEPARATOR.join(texts).encode("utf-8"))]
        count += 1
        if count % _SAMPLES_PER_TRANSACTION == 0:
            _put(environment, pending)
            pending = []
            on_progress(count)
    _put(environment, [*pending, ("length", str(count).encode())])
    on_progress(count)
    return count


def _check_texts(index: int, texts: Sequence[str], width: int) -> None:
    if len(texts) != width:
        raise UserError(f"picture {index} has {len(texts)} attributes, the ones before have {width}; give every "
                        "picture as many (an empty one where it is unknown)")
    for text in texts:
        if SEPARATOR in text:
            raise UserError(f"picture {index}: attribute {text!r} contains {SEPARATOR!r}, which separates "
                            "attributes; use another sign")


def _encode(picture: Image.Image | np.ndarray, resolution: int, image_format: str) -> bytes:
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    stream = io.BytesIO()
    square(picture.convert("RGB"), resolution).save(stream, format=image_format, quality=95)
    return stream.getvalue()


def _put(environment: Any, pairs: list[tuple[str, bytes]]) -> None:
    """Write all pairs in one transaction, doubling the map as often as it proves too small."""
    while True:
        try:
            with environment.begin(write=True) as transaction:
                for key, value in pairs:
                    transaction.put(key.encode(), value)
            return
        except _lmdb().MapFullError:
            environment.set_mapsize(environment.info()["map_size"] * 2)
