"""scripts/preprocess_clip.py: complete, killed and continued; added, removed, broken and odd images."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from legacy_configs import save_clip
from PIL import Image
from script_modules import load_script

import ldm.evaluation.clip_embeddings as computation
from ldm.data.formats.clip_embeddings import EmbeddingTable, read_table, with_embeddings, write_table
from ldm.data.world import World3D
from ldm.modules.encoders.clip_loading import build_clip

ROOT = Path(__file__).parents[2]
SLOW = """
import sys, time
sys.path.insert(0, {root!r})
import ldm.evaluation.clip_embeddings as computation
encode = computation.ImageEncoder.__call__
def slow(*arguments):
    time.sleep(0.15)
    return encode(*arguments)
computation.ImageEncoder.__call__ = slow
import runpy
sys.argv = [{script!r}, *{words!r}]
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def clip_guided_clip(tmp_path_factory):
    return str(save_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "tiny" / "train"
    rng = np.random.default_rng(0)
    for k in range(30):
        path = folder / f"n{k % 3:02d}" / "images" / f"{k}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 64, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture
def run(clip_guided_clip, capsys, monkeypatch, tmp_path):
    """Runs the script: (exit status, output)."""
    monkeypatch.chdir(tmp_path)
    script = load_script("preprocess_clip")

    def call(*words, clip=clip_guided_clip, batch_size="4"):
        options = ["--clip", clip, "--batch_size", batch_size, "--num_workers", "0"]
        status = script.main([*map(str, words), *options])
        said = capsys.readouterr()
        return status, said.out + said.err

    return call


def same(one, other):
    one, other = (read_table(Path(path)) for path in (one, other))
    assert one.names == other.names and one.values.tobytes() == other.values.tobytes()
    assert one.record == other.record


_SLOW = [pytest.param(suffix, marks=pytest.mark.slow) for suffix in (".csv", ".h5")]


@pytest.mark.parametrize("suffix", [".safetensors", *_SLOW])
def test_clip_guided_kill_and_resume_equal_an_uninterrupted_run(run, images, tmp_path, clip_guided_clip, suffix):
    whole, killed = tmp_path / f"whole{suffix}", tmp_path / f"killed{suffix}"
    status, said = run("--data_dir", images, "--output", whole)
    assert status == 0 and "30 embeddings (64 wide" in said and "images/s" in said
    words = ["--data_dir", str(images), "--output", str(killed), "--clip", clip_guided_clip, "--batch_size", "4"]
    code = SLOW.format(root=str(ROOT), script=str(ROOT / "scripts/preprocess_clip.py"), words=[*words])
    parts = tmp_path / f".killed{suffix}.parts"
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)})
    while process.poll() is None and len(list(parts.glob("*.safetensors"))) < 2:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert parts.exists() and not killed.exists()
    (parts / ".9.safetensors.0.tmp").write_bytes(b"half")  # a batch that was being written
    computed = []
    encode = computation.ImageEncoder.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(computation.ImageEncoder, "__call__", lambda self, x: computed.append(len(x)) or encode(self, x))
        status, said = run("--data_dir", images, "--output", killed)
    assert status == 0 and 0 < sum(computed) <= 22
    same(whole, killed)
    assert not parts.exists()
    if suffix == ".csv":
        assert whole.read_bytes() == killed.read_bytes()


def test_clip_guided_partial_csv_of_another_program(run, images, tmp_path):
    run("--data_dir", images, "--output", "whole.csv")
    text = (tmp_path / "whole.csv").read_text()
    lines = text.splitlines(keepends=True)
    (tmp_path / "c.csv").write_text("".join(lines[:7]) + lines[7][:100])
    status, said = run("--data_dir", images, "--output", "c.csv")
    assert status == 0
    one, other = read_table(tmp_path / "whole.csv"), read_table(tmp_path / "c.csv")
    assert one.names == other.names and np.array_equal(one.values[:7], other.values[:7])
    assert np.allclose(one.values, other.values, atol=1e-5)
    for number, start in enumerate(("", lines[0][:90])):
        (tmp_path / f"start{number}.csv").write_text(start)
        assert run("--data_dir", images, "--output", f"start{number}.csv")[0] == 0
        assert (tmp_path / f"start{number}.csv").read_text() == text
    (tmp_path / "d.csv").write_text("".join(f"{line.split(',')[0]}{',1' * 64}\n" for line in lines[:7]))
    before = (tmp_path / "d.csv").read_text()
    status, said = run("--data_dir", images, "--output", "d.csv")
    assert status == 1 and "by the CLIP" in said and "got others" in said and (tmp_path / "d.csv").read_text() == before
    (tmp_path / "e.csv").write_text("".join(lines[:2] * 2))
    status, said = run("--data_dir", images, "--output", "e.csv")
    assert status == 1 and "got two of" in said


def test_clip_guided_csv_of_other_images_and_an_unknown_clip(run, images, tmp_path):
    (tmp_path / "c.csv").write_text("elsewhere/0.png" + ",1" * 64 + "\n")
    status, said = run("--data_dir", images, "--output", "c.csv")
    assert status == 1 and "expected embeddings of these images by the CLIP" in said
    assert (tmp_path / "c.csv").read_text().count("\n") == 1


def test_clip_guided_images_added_after_a_kill(run, images, tmp_path, monkeypatch):
    """Finished batches remain, although those of the second call start at other images."""
    encode, kills = computation.ImageEncoder.__call__, iter([False, False, True, False, True])

    def killed(self, x):
        if next(kills, False):
            raise KeyboardInterrupt
        return encode(self, x)

    monkeypatch.setattr(computation.ImageEncoder, "__call__", killed)
    for count in (2, 3):
        assert run("--data_dir", images, "--output", "c.h5")[0] != 0
        found = [read_table(path) for path in (tmp_path / ".c.h5.parts").glob("*.safetensors")]
        assert len({name for part in found for name in part.names}) == 4 * count
        Image.new("RGB", (64, 40)).save(images / "n00/images/!.png")
    assert run("--data_dir", images, "--output", "c.h5")[0] == 0
    assert len(read_table(tmp_path / "c.h5").names) == 31


def test_clip_guided_added_removed_and_other_folders(run, images, tmp_path, monkeypatch):
    run("--data_dir", images, "--output", "c.h5")
    first = read_table(tmp_path / "c.h5")
    Image.new("RGB", (64, 40)).save(images / "n00/images/00.png")
    (images / "n01/images/1.JPEG").unlink()
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (64, 64), (9, 9, 9)).save(other / "o.png")
    (other / "broken.png").write_bytes(b"broken")
    assert run("--data_dir", images, "--output", "c.h5")[0] == 0
    assert run("--data_dir", other, "--output", "c.h5")[0] == 0
    second = read_table(tmp_path / "c.h5")
    assert set(second.names) - set(first.names) == {f"{images}/n00/images/00.png", f"{other}/o.png"}
    assert set(first.names) <= set(second.names)
    place = [second.names.index(name) for name in first.names]
    assert np.array_equal(second.values[place], first.values)
    assert run("--data_dir", images, "--output", "c.h5")[0] == 0
    table = read_table(tmp_path / "c.h5")
    assert len(table.names) == 32 and f"{other}/broken.png" not in table.names
    folder = {"target": "ldm.data.formats.folder.ImageFolder", "params": {"path": str(images)}}
    assert len(with_embeddings(folder, tmp_path / "c.h5")) == 30


def test_clip_guided_folder_that_changes_meanwhile(run, images, tmp_path, monkeypatch):
    encode = computation.ImageEncoder.__call__

    def change(self, x):
        (images / "n02/images/29.JPEG").unlink(missing_ok=True)
        Image.new("RGB", (64, 40)).save(images / "n02/images/new.png")
        return encode(self, x)

    monkeypatch.setattr(computation.ImageEncoder, "__call__", change)
    status, said = run("--data_dir", images, "--output", "c.csv")
    assert status == 0 and "29 embeddings" in said
    assert "skipped, because they cannot be read: 1 images" in said and "29.JPEG" in said
    assert "added meanwhile, and not in the file" in said and "new.png" in said
    status, said = run("--data_dir", images, "--output", "c.csv")
    assert status == 0 and "30 embeddings" in said and "added" not in said and "skipped" not in said


def test_clip_guided_odd_and_broken_images(run, images, tmp_path, clip_guided_clip):
    pixels = World3D(size=64).images(np.array([7]))[0]
    odd = tmp_path / "odd"
    odd.mkdir()
    Image.fromarray(pixels).convert("L").save(odd / "grey.png")
    Image.fromarray(pixels).convert("RGBA").save(odd / "alpha.png")
    Image.fromarray(pixels).convert("P").save(odd / "palette.png")
    Image.fromarray(pixels).save(odd / "cut.jpg")
    (odd / "cut.jpg").write_bytes((odd / "cut.jpg").read_bytes()[:400])
    (odd / "empty.png").write_bytes(b"")
    status, said = run("--data_dir", odd, "--output", "c.safetensors")
    assert status == 0 and "cannot be read: 2 images" in said and "cut.jpg" in said and "empty.png" in said
    table = read_table(tmp_path / "c.safetensors")
    assert [Path(name).name for name in table.names] == ["alpha.png", "grey.png", "palette.png"]
    encoder = computation.load_image_encoder(clip_guided_clip)
    whole = encoder(encoder.preprocess(Image.fromarray(pixels))[None])[0]
    assert np.allclose(table.values[0], whole, atol=1e-5)
    for name in ("alpha.png", "grey.png", "palette.png"):
        (odd / name).unlink()
    status, said = run("--data_dir", odd, "--output", "d.csv")
    assert status == 1 and "expected images that can be read, got none" in said and not Path("d.csv").exists()


def test_clip_guided_bad_input(run, images, tmp_path, clip_guided_clip):
    (tmp_path / "empty").mkdir()
    status, said = run("--data_dir", tmp_path / "empty", "--output", "c.csv")
    assert status == 1 and "expected images" in said
    status, said = run("--data_dir", tmp_path / "none", "--output", "c.csv")
    assert status == 1 and "expected a folder of images" in said
    status, said = run("--data_dir", images, "--output", "c.npy")
    assert status == 1 and "expected a file of embeddings (.csv, .safetensors, .h5, .hdf5)" in said
    Path("file").write_text("")
    status, said = run("--data_dir", images, "--output", "file/c.csv")
    assert status == 1 and "file/c.csv: 0.0 GB could not be written" in said
    status, said = run("--data_dir", images, "--output", "c.csv", batch_size="0")
    assert status == 1 and "--batch_size: expected an integer of at least 1" in said
    status, said = run("--data_dir", images, "--output", "c.csv", clip="./no_clip")
    assert status == 1 and "does not exist" in said


def test_clip_guided_another_clip(run, images, tmp_path, clip_guided_clip):
    assert run("--data_dir", images, "--output", "c.h5")[0] == 0
    table = read_table(tmp_path / "c.h5")
    write_table(EmbeddingTable(table.path, table.names, table.values, {"clip": "a", "fingerprint": "b"}))
    before = table.path.read_bytes()
    status, said = run("--data_dir", images, "--output", "c.h5")
    assert status == 1 and "got those of a (64 wide, fingerprint b)" in said and table.path.read_bytes() == before
    part = EmbeddingTable(
        tmp_path / ".d.h5.parts/1.safetensors", table.names[:2], table.values[:2], {"fingerprint": "b"}
    )
    write_table(part)
    status, said = run("--data_dir", images, "--output", "d.h5")
    assert status == 1 and "d.h5.parts/1.safetensors: expected embeddings of the CLIP" in said and part.path.exists()


def test_clip_guided_two_processes_on_one_file(run, images, tmp_path):
    with computation.FileLock(tmp_path / ".c.csv.lock"):
        status, said = run("--data_dir", images, "--output", "c.csv")
    assert status == 1 and "another process computes this file" in said


def test_clip_guided_data_sets_of_a_config(run, tmp_path):
    world = {"target": "ldm.data.world.World3D", "params": {"size": 64, "split": "train", "limit": 9}}
    held_out = {"target": world["target"], "params": {**world["params"], "split": "validation", "limit": 5}}
    data = {"target": "main.DataModuleFromConfig", "params": {"batch_size": 2, "train": world}}
    Path("plain.yaml").write_text(yaml.safe_dump({"data": data}))
    status, said = run("--base", "plain.yaml", "--output", "w.csv", "data.params.train.params.limit=7")
    assert status == 0 and "7 embeddings" in said
    wrapper = "ldm.data.formats.clip_embeddings.with_embeddings"
    for name, section in (("train", world), ("validation", held_out)):
        data["params"][name] = {"target": wrapper, "params": {"embeddings": "w.csv", "data": section}}
    Path("wrapped.yaml").write_text(yaml.safe_dump({"data": data}))
    status, said = run("--base", "wrapped.yaml", "--output", "w.csv")
    assert status == 0 and "14 embeddings" in said
    for section, count in ((world, 9), (held_out, 5)):
        found = with_embeddings(section, "w.csv")
        assert len(found) == count and found[0]["clip_embedding"].shape == (64,)


def test_clip_guided_preprocessing_is_that_of_openai(tmp_path, clip_guided_clip, monkeypatch):
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

    from ldm.modules.encoders.clip_loading import find_clip

    config = find_clip(clip_guided_clip).model_cfg
    model = build_clip({**config, "vision_cfg": {**config["vision_cfg"], "image_size": 48}})
    monkeypatch.setattr(computation, "load_clip", lambda source: model)
    source = find_clip(clip_guided_clip)
    source.preprocess_cfg.clear()
    source.preprocess_cfg.update(find_clip("ViT-B/32", is_optional=True).preprocess_cfg)
    monkeypatch.setattr(computation, "find_clip", lambda *_: source)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    published = Compose([Resize(48, InterpolationMode.BICUBIC), CenterCrop(48), ToTensor(), Normalize(mean, std)])
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 100, 3), dtype=np.uint8))
    assert computation.load_image_encoder("ViT-B/32").preprocess(picture).equal(published(picture))


def test_clip_guided_workers_and_batch_sizes_do_not_change_the_rows(run, images, tmp_path):
    script = load_script("preprocess_clip")
    assert run("--data_dir", images, "--output", "a.csv")[0] == 0
    words = ["--clip", read_table(tmp_path / "a.csv").record["clip"], "--batch_size", "7", "--num_workers", "2"]
    assert script.main(["--data_dir", str(images), "--output", "b.h5", *words]) == 0
    one, other = read_table(tmp_path / "a.csv"), read_table(tmp_path / "b.h5")
    assert one.names == other.names and one.record == other.record
    assert np.allclose(one.values, other.values, atol=1e-5)
