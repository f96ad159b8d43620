"""Emoji of people as a set of images with attributes: role x gender x skin tone x style.

The pictures come from two npm packages, ``emoji-datasource-google`` (Noto Emoji) and ``emoji-datasource-twitter``
(Twemoji). Layout of their archives: ``package/emoji.json``, a list of entries with ``name``, ``image`` and
``skin_variations`` (code of the tone -> entry), and ``package/img/<vendor>/64/<image>``.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from PIL import Image

from ldm.data.formats.picture_files import Decoding, decode_picture
from ldm.data.paths import AnyPath
from ldm.util import UserError

VERSION = "16.0.0"
STYLES = {"google": "noto", "twitter": "twemoji"}  # vendor in the names of the packages -> word
# code of the skin tone in ``skin_variations`` ("" for the entry itself) -> word
TONES = {"": "yellow", "1F3FB": "light", "1F3FC": "medium light"}
TONES |= {"1F3FD": "medium", "1F3FE": "medium dark", "1F3FF": "dark"}
COLUMNS = ("file", "role", "gender", "tone", "style")
TABLE, LICENCE = "attributes.csv", "LICENSE.txt"
_SIDE = 64
_LICENCE = """Emoji of people, {side} x {side} pixels

noto/     Noto Emoji, Copyright Google LLC. Apache License, Version 2.0
          https://www.apache.org/licenses/LICENSE-2.0
          https://github.com/googlefonts/noto-emoji
twemoji/  Twemoji graphics, Copyright Twitter, Inc and other contributors. Creative Commons Attribution 4.0 (CC-BY 4.0)
          https://creativecommons.org/licenses/by/4.0/
          https://github.com/twitter/twemoji

Both were taken from the npm packages emoji-datasource-google and emoji-datasource-twitter, version {version}, by Cal
Henderson (https://github.com/iamcal/emoji-data; MIT licence for the packaging).

Changes: the pictures were placed on a white background, scaled to {side} x {side} pixels where they had another size,
and renamed. If you show or redistribute the pictures, keep this notice.
"""


def write_emoji(out: AnyPath, packages: AnyPath | None = None) -> tuple[int, int]:
    """Write the pictures, ``attributes.csv`` and ``LICENSE.txt``, atomically.

    Only roles with both genders, all six tones and both styles are written, so that the table is a full product.

    Args:
        out: folder to write; must not exist, or be empty.
        packages: folder of the two archives; those that are missing are fetched into it with ``npm pack``. None uses a
            temporary folder.

    Returns:
        Number of pictures and of roles.

    Raises:
        UserError: ``out`` is in use, an archive is missing and npm is not installed, or an archive is damaged.
    """
    target = Path(out)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} exists already. Remove it, or choose another name.")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with _archives(packages) as archives:
        contents = {vendor: _read_archive(archives[vendor], vendor) for vendor in STYLES}
        combinations = _full_product(archives["google"], contents)
        try:
            temporary.mkdir(parents=True)
            rows = [*_write_pictures(temporary, combinations, archives, contents)]
            with open(temporary / TABLE, "w", newline="", encoding="utf-8") as stream:
                csv.writer(stream).writerows([COLUMNS, *rows])
            (temporary / LICENCE).write_text(_LICENCE.format(side=_SIDE, version=VERSION), encoding="utf-8")
            os.replace(temporary, target)
        except OSError as error:
            raise UserError(
                f"{target} could not be written ({error}). Free some disk space, or choose another folder."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return len(rows), len({role for role, *_ in combinations})


@contextmanager
def _archives(packages: AnyPath | None) -> Iterator[dict[str, Path]]:
    """Yield the archive of each vendor; fetch those that are missing with ``npm pack``."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary if packages is None else packages)
        files = {vendor: folder / f"emoji-datasource-{vendor}-{VERSION}.tgz" for vendor in STYLES}
        missing = {f"emoji-datasource-{vendor}@{VERSION}": file for vendor, file in files.items() if not file.is_file()}
        if missing:
            wanted, place = " and ".join(file.name for file in missing.values()), packages or "a folder"
            command = ["npm", "pack", *missing]
            next_step = f"Run '{' '.join(command)}' where npm exists, put {wanted} in {place}, and pass --packages."
            folder.mkdir(parents=True, exist_ok=True)
            try:
                done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            except FileNotFoundError as error:
                raise UserError(f"npm: expected the command npm to fetch {wanted}, got none. {next_step}") from error
            if done.returncode or not all(file.is_file() for file in missing.values()):
                reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise UserError(f"npm pack: expected {wanted}, got status {done.returncode} ({reason}). {next_step}")
        yield files


def _read_archive(path: Path, vendor: str) -> dict[str, bytes]:
    """Return the content of ``emoji.json`` and of the pictures of an archive by name, without unpacking it to disk."""
    prefix, found = f"package/img/{vendor}/{_SIDE}/", {}
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts:
                    raise UserError(f"{path}: expected files in package/, got {member.name!r}. Fetch it again.")
                is_wanted = member.name == "package/emoji.json" or str(name.parent) + "/" == prefix
                if is_wanted and member.isreg():
                    found[name.name] = archive.extractfile(member).read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"{path}: expected an archive of npm pack, got: {error}. Fetch it again.") from error
    if len(found) < 2 or "emoji.json" not in found:
        raise UserError(f"{path}: expected package/emoji.json and pictures in {prefix}, got none. Fetch it again.")
    return found


def _full_product(path: Path, contents: Mapping[str, Mapping[str, bytes]]) -> dict[tuple[str, str, str], str]:
    """Return (role, gender, tone) -> file name, in order; roles that lack a combination are left out."""
    images: dict[tuple[str, str, str], str] = {}
    try:
        for entry in json.loads(contents["google"]["emoji.json"]):
            words = re.findall(r"[a-z0-9-]+", entry["name"].lower())  # such as WOMAN: RED HAIR
            is_one_person = words[:1] in (["woman"], ["man"]) and "and" not in words
            if is_one_person and words[-2:] != ["facing", "right"] and "skin_variations" in entry:
                variants = {"": entry, **entry["skin_variations"]}
                named = " ".join(words[1:]) or "adult", words[0]
                images |= {(*named, TONES[code]): variants[code]["image"] for code in TONES if code in variants}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: expected a list of emoji in emoji.json, got: {error!r}. Fetch it again.") from error
    images = {key: image for key, image in images.items() if all(image in content for content in contents.values())}
    counts = Counter(role for role, *_ in images)
    complete = {key: images[key] for key in sorted(images) if counts[key[0]] == 2 * len(TONES)}
    if not complete:
        raise UserError(f"{path}: expected roles with both genders and {len(TONES)} skin tones, got none.")
    return complete


def _write_pictures(
    folder: Path,
    combinations: Mapping[tuple[str, str, str], str],
    archives: Mapping[str, Path],
    contents: Mapping[str, Mapping[str, bytes]],
) -> Iterator[tuple[str, ...]]:
    """Write the pictures on white; yield the rows of the table."""
    for combination, image in combinations.items():
        for vendor, style in STYLES.items():
            name = f"{style}/{'-'.join(combination).replace(' ', '-')}.png"
            picture = decode_picture(contents[vendor][image], f"{archives[vendor]}: {image}", Decoding(None))
            if picture.size != (_SIDE, _SIDE):
                picture = picture.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
            flat = Image.new("RGBA", picture.size, "white")
            flat.alpha_composite(picture)
            (folder / name).parent.mkdir(exist_ok=True)
            flat.convert("RGB").save(folder / name)
            yield (name, *combination, style)
