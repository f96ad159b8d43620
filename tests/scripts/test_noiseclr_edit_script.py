"""``scripts/edit.py`` on a small text model, and on a run of NoiseCLR trained two steps."""

import json
import logging

import numpy as np
import pytest
import torch
from direction_models import save_text_model, train_noiseclr
from PIL import Image
from script_modules import load_script

import main as front_door
from ldm.evaluation.directions.edit import Editor
from ldm.models.diffusion.methods.noiseclr.denoiser import RunDenoiser
from ldm.models.diffusion.methods.noiseclr.directions import DirectionSet
from ldm.runs.load import load_run

STEPS = ["-c", "5", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("edit")


@pytest.fixture(scope="module")
def zoo(folder):
    return save_text_model(folder / "zoo")


@pytest.fixture(scope="module")
def run(folder, zoo):
    return train_noiseclr(folder, zoo)


@pytest.fixture(scope="module")
def denoiser(zoo):
    return RunDenoiser(str(zoo))


def rows(denoiser, count=3, seed=0, **changes):
    torch.manual_seed(seed)
    return DirectionSet.of(denoiser, 3 * denoiser.initial_rows(count), denoiser.row_space, "random", **changes)


@pytest.fixture(scope="module")
def file(folder, denoiser):
    rows(denoiser).save(folder / "a.safetensors")
    return folder / "a.safetensors"


@pytest.fixture(scope="module")
def photo(folder):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(folder / "photo.png")
    return folder / "photo.png"


def difference(first, second):
    """The largest difference of two pictures; batches of other sizes round differently."""
    return np.abs(first.astype(int) - second).max()


@pytest.fixture
def edit(tmp_path, capsys):
    """Runs the script; returns its record, its pictures by name, and the single images."""
    script = load_script("edit")

    def edit(*words):
        code = script.main([*map(str, words), *STEPS, "-o", str(tmp_path / "out")])
        captured = capsys.readouterr()
        if code:
            return captured.err
        paths = captured.out.split()
        assert all(path.startswith(str(tmp_path / "out")) for path in paths) and paths[-1].endswith("edit.json")
        found = {path.stem: np.array(Image.open(path)) for path in (tmp_path / "out" / "images").glob("*.png")}
        return json.loads((tmp_path / "out" / "edit.json").read_text()), paths, found

    return edit


def test_generated_images_of_a_run(edit, run):
    record, paths, images = edit("-r", run, "-d", "3:400.0", "-d", "<t6>:-200:0:2", "--text", "a red cube", "-n", 2)
    assert [path.rpartition("/")[2] for path in paths] == ["grid.png", "edit.json"]
    assert sorted(images) == ["000-000", "000-001", "001-000", "001-001"]
    assert images["000-000"].shape == (32, 32, 3)
    assert (images["000-000"] != images["000-001"]).any() and (images["000-000"] != images["001-000"]).any()
    assert record["variants"][0] == [] and record["variants"][1] == [
        {"direction": 2, "strength": 400.0, "start": 0, "end": None, "name": "<t3>"},
        {"direction": 5, "strength": -200.0, "start": 0, "end": 2, "name": "<t6>"},
    ]
    assert record["finder"] == "noiseclr" and record["kind"] == "token" and record["guidance_scale"] == 7.5
    assert record["sampler"]["name"] == "ddim" and record["sampler"]["num_steps"] == 5 and record["seed"] == 0
    assert record["run"] == str(run) and record["text"] == ["a red cube"] and "reconstruction_mse" not in record


def test_a_grid_and_its_animation(edit, zoo, file):
    words = ["--denoiser", zoo, "--directions", file, "--grid", "2=-40,0,40:1:3", "-n", 3, "--gif", "--batch_size", 2]
    record, paths, images = edit(*words)
    assert [path.rpartition("/")[2] for path in paths] == ["grid.png", "edits.gif", "edit.json"]
    assert len(images) == 12 and record["guidance_scale"] == 1
    for row in range(3):
        base, *edited = (images[f"{row:03d}-{number:03d}"] for number in range(4))
        assert difference(base, edited[1]) <= 1 and (base != edited[0]).any() and (edited[0] != edited[2]).any()
    assert Image.open(paths[1]).n_frames == 4
    # Images of another batch are the same.
    _, _, alone = edit(*words[:-1], 1)
    assert max(difference(picture, images[name]) for name, picture in alone.items() if name[:3] == "000") <= 1


def test_two_grids_give_a_picture_for_each_image(edit, zoo, file):
    words = ["--denoiser", zoo, "--directions", file, "--grid", "1=0,60", "--grid", "<t2>=-60,0,60", "-d", "3:10"]
    record, paths, images = edit(*words, "-n", 2)
    assert [path.rpartition("/")[2] for path in paths] == ["grid-000.png", "grid-001.png", "edit.json"]
    assert len(images) == 2 * 7
    strengths = [[each["strength"] for each in variant] for variant in record["variants"][1:]]
    assert strengths == [[10, first, second] for first in (0, 60) for second in (-60, 0, 60)]


def test_a_stochastic_sampler_draws_the_same_noise_for_an_image_and_its_edits(edit, zoo, file):
    _, _, images = edit("--denoiser", zoo, "--directions", file, "--grid", "1=0", "-n", 2, "--eta", 1)
    assert difference(images["000-000"], images["000-001"]) <= 1
    assert difference(images["001-000"], images["001-001"]) <= 1


def test_directions_of_several_files(edit, zoo, file, folder, run, denoiser):
    rows(denoiser, 2, seed=1).save(folder / "b.safetensors")
    words = ["--denoiser", zoo, "--directions", file, f"art={folder / 'b.safetensors'}", run]
    record, _, images = edit(*words, "-d", "a/<t2>:5", "-d", "art/<t1>:30", "-d", "6:1", "-n", 1)
    assert [each["direction"] for each in record["variants"][1]] == [1, 3, 5]
    assert record["variants"][1][2]["name"] == f"{run.stem}/<t1>" and record["finder"] == "random, noiseclr"
    assert "expected different names, got 'a' twice" in edit("--denoiser", zoo, "--directions", file, file, "-d", 1)


def test_shifts_of_the_bottleneck(edit, zoo, folder, denoiser):
    x = torch.zeros(1, *denoiser.latent_shape)
    width = denoiser.bottleneck_features(x, torch.zeros(1, dtype=torch.long), denoiser.null(1)).numel()
    torch.manual_seed(0)
    DirectionSet.of(denoiser, torch.randn(2, width), "bottleneck", "pca", ("pc1", "pc2")).save(folder / "h.safetensors")
    words = ["--denoiser", zoo, "--directions", folder / "h.safetensors", "-d", "pc2:3"]
    record, _, images = edit(*words, "-n", 1, "--text", "a blue cube", "--negative_text", "red")
    assert record["kind"] == "bottleneck" and (images["000-000"] != images["000-001"]).any()
    assert record["guidance_scale"] == 7.5 and record["negative_text"] == "red"


def test_real_images(edit, zoo, file, photo, tmp_path, caplog):
    with Image.open(photo) as picture:
        picture.resize((96, 64)).save(tmp_path / "wide.jpg")
    caplog.set_level(logging.INFO, "ldm")
    words = ["--denoiser", zoo, "--directions", file, "-d", "1:40", "--image", photo, tmp_path / "wide.jpg"]
    record, _, images = edit(*words)
    assert (
        "wide.jpg: cropped at the centre and resized from 96x64 to 32x32" in caplog.text
        and "photo.png" not in caplog.text
    )
    assert record["guidance_scale"] == 1 and len(record["reconstruction_mse"]) == 2
    assert (images["000-000"] != images["000-001"]).any()
    described, _, _ = edit(*words[:-1], "--text", "a red cube", "--null_text", "--guidance_scale", 3)
    assert described["guidance_scale"] == 3 and described["null_text"] and len(described["reconstruction_mse"]) == 1


def test_null_text_lowers_the_reconstruction_error(denoiser, file, photo):
    from ldm.diffusion.samplers import DDIMSampler

    editor = Editor(denoiser, DirectionSet.load(file), DDIMSampler(20))
    real = load_script("edit").read_images([photo], *editor.image_size)
    z = denoiser.encode(real)

    def error(start):
        return (sampled(editor, start) - z).square().mean().item()

    plain = editor.inverted(real, ["a red cube"])
    learned = editor.inverted(real, ["a red cube"], 7.5, use_null_text=True)
    unguided, guided = error(plain), error(plain._replace(guidance_scale=7.5))
    assert error(learned) < 0.5 * guided and unguided < guided
    fewer = Editor(denoiser, DirectionSet.load(file), DDIMSampler(4))
    coarse = (sampled(fewer, fewer.inverted(real, ["a red cube"])) - z).square().mean().item()
    assert unguided < coarse


def sampled(editor, start):
    """The latents of a start without edits."""
    given = editor.directions.edited(
        editor.denoiser, [], editor.sampler, len(start.x_T), start.cond, start.guidance_scale, start.negative
    )
    return editor.sampler.sample(given, start.x_T, editor.denoiser.schedule)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-d", "9"], "direction '9': expected 1 to 3, or one of <t1>"),
        (["-d", "<t4>:2"], "direction '<t4>': expected"),
        (["-d", "1:2:5"], "edit by 1: expected a first step of 0 to 4, got 5"),
        (["-d", "1", "--image", "missing.png"], "--image missing.png: there is no such file"),
        (["-d", "1", "--sampler", "euler"], "sampler: expected one of"),
        (["-d", "1", "--text", "a mauve cube"], "'mauve'"),
        (["-d", "1", "-c", "99"], "expected num_steps between 2 and 40"),
        (["-d", "1", "--image", "PHOTO", "--sampler", "plms"], "expected the sampler ddim with eta 0"),
        (["-d", "1", "--image", "PHOTO", "--eta", "0.5"], "expected the sampler ddim with eta 0"),
        (["-d", "1", "--image", "PHOTO", "--null_text"], "expected texts that describe the images"),
        (["-d", "1", "--device", "cuda:77"], "--device: expected a device of this machine"),
    ],
)
def test_errors_of_a_request(zoo, file, photo, capsys, words, message):
    words = [str(photo) if word == "PHOTO" else word for word in words]
    common = ["--denoiser", str(zoo), "--directions", str(file), *STEPS]
    assert load_script("edit").main([*common, *words]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected at least one -d or --grid"),
        (["-d", "1:abc"], "expected NAME[:STRENGTH[:START[:END]]] with numbers, got '1:abc'"),
        (["-d", "1:nan"], "with finite numbers"),
        (["-d", "1:2:x"], "with numbers"),
        (["-d", "1:2:3:4:5"], "with numbers"),
        (["-d", "1:2:5:3"], "0 <= START <= END"),
        (["-d", ":2"], "got ':2'"),
        (["--grid", "1"], "expected NAME=STRENGTH,STRENGTH"),
        (["--grid", "1=a,b"], "with numbers, got '1=a,b'"),
        (["--grid", "1=1,,2"], "with numbers"),
        (["--grid", "1=1", "--grid", "2=1", "--grid", "3=1"], "expected at most two, got 3"),
        (["-d", "1", "--gif"], "--gif: expected one --grid, got 0"),
        (["-d", "1", "-n", "0"], "expected at least 1"),
        (["-d", "1", "-n", "2", "--image", "a.png"], "expected either -n or --image"),
        (["-d", "1", "--null_text"], "expected --image"),
        (["-d", "1", "--guidance_scale", "3"], "expected --text"),
        (["-d", "1", "--image", "a.png", "--text", "a", "--guidance_scale", "3"], "expected --null_text"),
        (["-d", "1", "--negative_text", "a"], "--negative_text: expected --text"),
    ],
)
def test_errors_of_a_command_line(capsys, words, message):
    with pytest.raises(SystemExit):
        load_script("edit").read_options(["-r", "run", *words])
    assert message in capsys.readouterr().err


def test_errors_of_models_and_files(edit, zoo, file, folder, denoiser, tmp_path, capsys):
    assert "-r" in edit("-r", zoo, "-d", 1) and "expected a run of NoiseCLR, got LatentDiffusion" in edit(
        "-r", zoo, "-d", 1
    )
    assert "does not exist" in edit("-r", tmp_path / "nowhere", "-d", 1)
    other = save_text_model(tmp_path / "other", seed=1)
    assert "expected directions of the model with fingerprint" in edit(
        "--denoiser", other, "--directions", file, "-d", 1
    )
    found = rows(denoiser)
    DirectionSet(found.values[:, :7].contiguous(), "token", found.names, "x").save(tmp_path / "narrow.safetensors")
    message = edit("--denoiser", zoo, "--directions", tmp_path / "narrow.safetensors", "-d", 1)
    assert "expected directions of kind token and width 16, got those of kind token and width 7" in message
    DirectionSet(found.values, "token", found.names, "x", None, (4, 64, 64)).save(tmp_path / "large.safetensors")
    message = edit("--denoiser", zoo, "--directions", tmp_path / "large.safetensors", "-d", 1)
    assert "expected directions for latents of shape (4, 8, 8), got those for latents of shape (4, 64, 64)" in message
    message = edit("--denoiser", zoo, "--directions", file, tmp_path / "large.safetensors", "-d", 1)
    assert "Combine directions of one model and one kind" in message
    (tmp_path / "damaged.safetensors").write_bytes(b"no")
    message = edit("--denoiser", zoo, "--directions", tmp_path / "damaged.safetensors", "-d", 1)
    assert "damaged.safetensors: damaged, truncated or not a checkpoint" in message
    (tmp_path / "text.png").write_text("no picture")
    message = edit("--denoiser", zoo, "--directions", file, "-d", 1, "--image", tmp_path / "text.png")
    assert "expected a complete PNG or JPEG image" in message
    with pytest.raises(SystemExit):
        edit("--denoiser", zoo, "-d", 1)
    assert "--denoiser: expected --directions FILE" in capsys.readouterr().err


def test_a_run_without_the_weights_of_its_denoiser_is_resumed(zoo, tmp_path, caplog):
    run = train_noiseclr(tmp_path, zoo)
    before = torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)
    assert list(before["state_dict"]) == ["rows"]
    assert front_door.main(["-r", str(run), "-t", "--no-test", "lightning.trainer.max_steps=3"]) == 0
    after = torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)
    assert after["global_step"] == 3 and not torch.equal(after["state_dict"]["rows"], before["state_dict"]["rows"])
    load_run(str(run))
    assert "missing in the file" not in caplog.text


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        load_script("edit").main(["--help"])
    shown = capsys.readouterr().out
    assert "--grid 3=-8,-4,0,4,8" in shown and "--null_text" in shown
