"""Emoji of people: the command, the roles that are kept, and archives that are refused."""

from __future__ import annotations

import io
import itertools
import json
import shlex
import tarfile

import numpy as np
import pytest
from PIL import Image
from script_modules import load_script

from ldm.data.formats import emoji
from ldm.data.formats.folder import ImageFolder

WHOLE = ("PILOT", ": RED HAIR", "")
OTHERS = ("WOMAN PILOT FACING RIGHT", "MAN AND WOMAN HOLDING HANDS", "WOMANS HAT", "MANGO", "GRINNING FACE")
VARIANTS = tuple(filter(None, emoji.TONES))


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run a command line in an empty folder: (exit status, output)."""
    tool = load_script("dataset")
    monkeypatch.chdir(tmp_path)

    def call(line):
        status = tool.main(shlex.split(line))
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return call


def entry(name, tones=VARIANTS):
    stem = name.replace(" ", "").replace(":", "").lower()
    return {
        "name": name,
        "image": f"{stem}.png",
        **({"skin_variations": {tone: {"image": f"{stem}-{tone.lower()}.png"} for tone in tones}} if tones else {}),
    }


def pictures_of(entries):
    return sorted(e["image"] for one in entries for e in (one, *one.get("skin_variations", {}).values()))


def encoded(seed, size=64):
    pixels = np.random.RandomState(seed).randint(0, 256, (size, size, 4), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(stream, "PNG")
    return stream.getvalue()


def write_archive(folder, vendor, entries, leave_out=(), extra=(), version=emoji.VERSION):
    folder.mkdir(exist_ok=True)
    files = {"package/emoji.json": json.dumps(entries).encode(), "package/img/google/sheets/64.png": b"sheet"}
    for seed, image in enumerate(pictures_of(entries)):
        if image not in leave_out:
            files[f"package/img/{vendor}/64/{image}"] = encoded(seed, 64 if vendor == "google" else 32)
    path = folder / f"emoji-datasource-{vendor}-{version}.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in (*files.items(), *extra):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def packages(tmp_path):
    """Archives in which three roles have all pictures."""
    entries = [
        entry(f"{gender}{'' if role[:1] == ':' else ' '}{role}".strip())
        for gender in ("WOMAN", "MAN")
        for role in WHOLE
    ]
    entries += [entry(name) for name in OTHERS[:3]] + [entry(name, ()) for name in OTHERS[3:]]
    entries += [entry("WOMAN DANCING"), entry("MAN ELF"), entry("WOMAN ELF", VARIANTS[:4])]
    entries += [entry("MAN COOK"), entry("WOMAN COOK")]
    for vendor in emoji.STYLES:
        write_archive(tmp_path / "down", vendor, entries, ["mancook-1f3fb.png"] if vendor == "twitter" else ())
    return entries


def test_roles_with_all_combinations_are_written(run, packages, tmp_path):
    status, output = run("emoji data/emoji --packages down")
    assert status == 0 and "72 pictures, 3 roles" in output
    folder = tmp_path / "data" / "emoji"
    data = ImageFolder(folder, "attributes.csv")
    assert data.space.factor_names == ("role", "gender", "tone", "style") and len(data) == 72
    assert data.space.factors_num_values == (3, 2, 6, 2)
    assert data.vocabulary.words[0] == ["adult", "pilot", "red hair"]
    assert set(data.vocabulary.words[2]) == set(emoji.TONES.values())
    licence = (folder / "LICENSE.txt").read_text()
    assert all(part in licence for part in ("Apache License, Version 2.0", "CC-BY 4.0", "Twitter", "MIT", "white"))
    assert not [path for path in (tmp_path / "data").iterdir() if path.name != "emoji"]
    seed = pictures_of(packages).index("womanredhair-1f3fd.png")
    original = Image.open(io.BytesIO(encoded(seed))).convert("RGBA")
    white = np.array(Image.alpha_composite(Image.new("RGBA", (64, 64), "white"), original).convert("RGB"))
    assert (np.array(Image.open(folder / "noto" / "red-hair-woman-medium.png")) == white).all()
    status, output = run("emoji data/emoji --packages nowhere")
    assert status == 0 and "contains the pictures already" in output


def test_an_existing_folder_is_kept(run, packages, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "holiday.png").write_bytes(b"")
    status, output = run("emoji mine --packages down")
    assert status == 1 and "mine exists already" in output and [*(tmp_path / "mine").iterdir()]
    (tmp_path / "empty").mkdir()
    assert run("emoji empty --packages down")[0] == 0


def test_an_interrupted_command_leaves_nothing(run, packages, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(emoji, "decode_picture", stop)
    assert run("emoji data/emoji --packages down")[0] != 0
    assert not [*(tmp_path / "data").iterdir()]


def test_packages_are_fetched_with_npm(run, packages, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    npm = tmp_path / "bin" / "npm"
    npm.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\ncp {tmp_path}/down/*.tgz .\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
    assert run("emoji one")[0] == 0
    wanted = "pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0"
    assert (tmp_path / "arguments").read_text().strip() == wanted
    assert run("emoji two --packages new")[0] == 0 and len([*(tmp_path / "new").iterdir()]) == 2
    npm.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\nexit 1\n")
    status, output = run("emoji three")
    assert status == 1 and "ENOTFOUND" in output and "--packages" in output
    monkeypatch.setenv("PATH", str(tmp_path))
    status, output = run("emoji three --packages nowhere")
    assert status == 1 and "emoji-datasource-google-16.0.0.tgz and emoji-datasource-twitter-16.0.0.tgz" in output
    assert "in nowhere" in output and not (tmp_path / "three").exists()


@pytest.mark.parametrize(
    "extra, message",
    [
        ([("package/../../evil.png", b"x")], "expected files in package/, got 'package/../../evil.png'"),
        ([("/evil.png", b"x")], "expected files in package/, got '/evil.png'"),
        ([("package/emoji.json", b"{")], "expected a list of emoji in emoji.json"),
        ([("package/emoji.json", b'[{"name": 3}]')], "expected a list of emoji in emoji.json"),
        ([("package/emoji.json", b"[]")], "expected roles with both genders and 6 skin tones, got none"),
        ([("package/img/google/64/womanpilot.png", b"no picture")], "womanpilot.png: expected a complete PNG"),
    ],
)
def test_bad_archives_are_refused(run, packages, tmp_path, extra, message):
    write_archive(tmp_path / "down", "google", packages, extra=extra)
    status, output = run("emoji out --packages down")
    assert status == 1 and message in " ".join(output.split()) and not (tmp_path / "out").exists()


def test_a_name_cannot_leave_the_folder(run, packages, tmp_path):
    entries = [entry(f"{gender} ../../{role}") for gender, role in itertools.product(("WOMAN", "MAN"), ("EVIL",))]
    for one in entries:
        one["image"] = one["image"].replace("/", "")
        for variant in one["skin_variations"].values():
            variant["image"] = variant["image"].replace("/", "")
    for vendor in emoji.STYLES:
        write_archive(tmp_path / "down", vendor, entries)
    assert run("emoji out --packages down")[0] == 0
    assert (tmp_path / "out" / "noto" / "evil-man-dark.png").is_file()


def test_truncated_archives_are_named(run, packages, tmp_path):
    path = tmp_path / "down" / "emoji-datasource-twitter-16.0.0.tgz"
    path.write_bytes(path.read_bytes()[:2000])
    status, output = run("emoji out --packages down")
    assert status == 1 and "emoji-datasource-twitter-16.0.0.tgz: expected an archive of npm pack" in output
