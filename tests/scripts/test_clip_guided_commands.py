"""scripts/train.py, scripts/generate.py and main.py -r <epoch>.pth of the CLIP-guided DDPM."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
import yaml
from legacy_configs import save_clip
from PIL import Image
from safetensors.torch import load_file, save_file
from script_modules import load_script

import main as front_door
from ldm.data.formats.clip_embeddings import read_table, write_table
from ldm.data.world import world_vocabulary
from ldm.diffusion.samplers import DDIMSampler, DDPMSampler, DPMSolverSampler
from ldm.modules.diffusionmodules.clip_guided import UNet
from ldm.runs.load import load_run

SIZE, WIDTH, T = 8, 64, 12
FLAT = {"img_size": SIZE, "img_channels": 3, "timesteps": T, "beta_start": 0.0001, "beta_end": 0.02}
FLAT |= {"epochs": 2, "batch_size": 4, "learning_rate": 0.0001, "c_drop_prob": 0.1}
FLAT |= {"down_channels": [32, 32, 64], "t_embed_dim": 8, "c_embed_dim": WIDTH, "num_workers": 0}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return str(save_clip(tmp_path_factory.mktemp("clip") / "clip"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The layout of Tiny ImageNet."""
    root, rng = tmp_path_factory.mktemp("data") / "tiny-imagenet-200", np.random.default_rng(0)
    for k in range(12):
        folder = root / ("val/images" if k % 4 == 3 else f"train/n{k % 2:02d}/images")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{k}.JPEG")
    return root


@pytest.fixture
def write(tmp_path, monkeypatch, tiny, clip_folder):
    """Writes a config of the reference code in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def write(config=None, **changes):
        content = (
            {**FLAT, "clip_model": clip_folder, "dataset_root": str(tiny), **changes} if config is None else config
        )
        (tmp_path / "default.yaml").write_text(yaml.safe_dump(content))
        return str(tmp_path / "default.yaml")

    return write


def train(*words):
    return load_script("train").main([*words])


def published(path, arch="package", **extra):
    """Write the reference's file after two steps of training."""
    torch.manual_seed(1)
    network = UNet(T, 3, SIZE, (32, 32, 64), 8, WIDTH, arch)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    for _ in range(2):
        optimizer.zero_grad()
        network(torch.randn(2, 3, SIZE, SIZE), torch.tensor([1, 5]), torch.randn(2, WIDTH)).square().mean().backward()
        optimizer.step()
    content = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 9, **extra}
    torch.save(content, path)
    return network.eval()


def test_seed_commands_train_and_generate(write, tiny, clip_folder, tmp_path, capsys):
    preprocess = load_script("preprocess_clip").main
    assert preprocess(["--data_dir", str(tiny / "train"), "--output", "clip.csv", "--clip", clip_folder]) == 0
    assert train("--config", write()) == 0
    run = next((tmp_path / "logs").iterdir())
    assert run.name.endswith("_default") and list((run / "checkpoints").glob("last.ckpt"))
    loaded = load_run(str(run))
    content = loaded.config.content
    assert loaded.num_steps == 6 and content["model"]["base_learning_rate"] == 0.0001
    assert loaded.model.num_timesteps == T and loaded.model.betas[-1] == 0.02
    assert loaded.model.loss_options.cond_drop_prob == 0.1
    assert train("--config", write(), "-r", str(run), "lightning.trainer.max_epochs=3") == 0
    assert load_run(str(run)).num_steps == 9 and len(list((tmp_path / "logs").iterdir())) == 1
    capsys.readouterr()
    words = ["--checkpoint", str(run), "--prompts", "red floor", "blue wall", "", "--output", "images/generated.png"]
    assert load_script("generate").main(words) == 0
    assert capsys.readouterr().out.strip() == "images/generated.png"
    assert Image.open("images/generated.png").size[1] > 3 * 96


def test_missing_embeddings_are_computed_first(write, tiny, clip_folder, tmp_path):
    assert train("--config", write(), "--skip-clip-extraction") == 1
    assert train("--config", write(clip_csv_path="other.csv"), "--no-animation", "-n", "mine") == 0
    assert len(list(csv.reader(open("other.csv")))) == 9
    assert [path.name.partition("_")[2] for path in (tmp_path / "logs").iterdir()] == ["mine"]


def test_sections_of_later_versions(write, tiny, clip_folder, tmp_path, caplog):
    names = {"model": ("img_size", "img_channels", "down_channels", "t_embed_dim", "c_embed_dim")}
    names |= {"diffusion": ("timesteps", "beta_start", "beta_end"), "training": ("batch_size", "learning_rate")}
    config = {section: {key: FLAT[key] for key in keys} for section, keys in names.items()}
    config["training"] |= {"epochs": 1, "save_frequency": 1, "c_drop_prob": 0.2, "ema": {"enabled": True, "decay": 0.9}}
    config["training"]["lr_scheduler"] = {"eta_min": 1e-6}
    config["data"] = {"dataset_root": str(tiny), "clip_csv_path": "c.csv", "max_samples": 8, "random_seed": 11}
    config |= {"clip": {"clip_model": clip_folder, "features": 64}, "generation": {"text_prompts": ["A fish"]}}
    assert train("--config", write(config)) == 0
    run = next((tmp_path / "logs").iterdir())
    model = load_run(str(run)).model
    assert model.use_ema and model.loss_options.cond_drop_prob == 0.2
    assert len(list((run / "checkpoints").glob("epoch=*.ckpt"))) == 1
    for ignored in ("lr_scheduler.eta_min", "features", "text_prompts"):
        assert f"{ignored} is ignored" in caplog.text


def test_h5_images(write, tmp_path):
    import h5py

    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"] = np.random.default_rng(0).integers(0, 256, (8, SIZE, SIZE, 3), dtype=np.uint8)
    assert train("--config", write(h5_path="a.h5", dataset_root=None, epochs=1)) == 0
    assert next(csv.reader(open("clip.csv")))[0] == "image_000000"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lerning_rate": 1e-4}, "unknown key 'lerning_rate'. Did you mean 'learning_rate'?"),
        ({"training": {"c_drop": 0.1}}, "unknown key 'c_drop'"),
        ({"down_channels": [30, 32, 64]}, "down_chs: expected three numbers of channels, multiples of 32"),
        ({"img_size": 30}, "img_size: expected a multiple of 4, got 30"),
        ({"dataset_root": "nowhere"}, "nowhere: expected a folder of images"),
        ({"c_embed_dim": 512}, "expected a CLIP 512 wide, as the condition of the network"),
        ({"clip_model": "ViT-L/14", "c_embed_dim": 512}, "expected a CLIP 512 wide"),
    ],
)
def test_bad_configs_of_train(changes, message, write, capsys):
    assert train("--config", write(**changes), "--skip-clip-extraction") == 1
    assert message in capsys.readouterr().err


def test_no_mapping(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("- 1\n")
    assert train("--config", str(tmp_path / "c.yaml")) == 1
    assert train("--config", str(tmp_path / "none.yaml")) == 1
    assert "does not exist" in capsys.readouterr().err


# Embeddings of another CLIP ------------------------------------------------------------------------------------------


def test_embeddings_of_another_clip_are_refused_before_the_first_step(write, tmp_path, capsys):
    assert train("--config", write(), "lightning.trainer.max_steps=1") == 0
    capsys.readouterr()
    other = save_clip(tmp_path / "other")
    file = next(other.glob("*.safetensors"))
    state = load_file(file)
    save_file({**state, "text_projection": state["text_projection"] + 1}, file)
    assert train("--config", write(clip_model=str(other)), "-n", "other") == 1
    message = capsys.readouterr().err
    assert "expected embeddings of the CLIP" in message and "fingerprint" in message
    table = read_table(tmp_path / "clip.csv")
    table.values, table.record = table.values[:, :32].copy(), {}
    write_table(table)
    assert train("--config", write(), "-n", "narrow") == 1
    assert "got those of an unknown CLIP (32 wide)" in capsys.readouterr().err
    assert train("--config", write(), "model.params.cond_stage_config=null", "-n", "without") == 1
    assert "clip.csv: expected embeddings 64 wide, as the condition of the network" in capsys.readouterr().err
    for run in (tmp_path / "logs").iterdir():
        if not run.name.endswith("_default"):
            assert not list(run.glob("checkpoints/*.ckpt"))


# main.py -r <epoch>.pth ----------------------------------------------------------------------------------------------


def test_published_files_continue_in_a_new_run(write, tmp_path, capsys):
    network = published(tmp_path / "9.pth")
    config = write(epochs=11)
    assert train("--config", config, "-r", str(tmp_path / "9.pth"), "lightning.trainer.max_steps=3") == 0
    run = next((tmp_path / "logs").iterdir())
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 3 and state["epoch"] == 10
    assert all(int(entry["step"]) == 3 for entry in state["optimizer_states"][0]["state"].values())
    drift = [state["state_dict"][f"model.diffusion_model.{k}"] - v for k, v in network.state_dict().items()]
    assert 0 < max(value.abs().max() for value in drift) < 5e-4  # one step of Adam at 1e-4
    assert front_door.main(["-r", str(tmp_path / "9.pth"), "-t"]) == 1  # no config
    assert "Name the folder of a run" in capsys.readouterr().err


# generate.py ---------------------------------------------------------------------------------------------------------


def generate(*words):
    return load_script("generate").main([*words])


@pytest.fixture
def pictures(monkeypatch):
    """Records what is drawn and sampled."""
    import ldm.pictures.draw as draw
    from ldm.models.diffusion.methods.clip_guided.model import CLIPGuidedDDPM

    seen, plain, sample_w = [], draw.draw_grid, CLIPGuidedDDPM.sample_w
    monkeypatch.setattr(draw, "draw_grid", lambda grid: seen.append(grid) or plain(grid))

    def recorded(self, texts, strengths, x_T, sampler):
        seen.append((self, texts, strengths, x_T, sampler))
        return sample_w(self, texts, strengths, x_T, sampler)

    monkeypatch.setattr(CLIPGuidedDDPM, "sample_w", recorded)
    return seen


@pytest.mark.parametrize("arch", ["package", "dli"])
def test_published_files_generate_as_their_network_does(arch, pictures, clip_folder, tmp_path):
    network = published(tmp_path / "9.pth", arch)
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"timesteps": T}))
    words = ["--clip", clip_folder, "--config", str(config), "--output", str(tmp_path / "x.png")]
    words += ["--checkpoint", str(tmp_path / "9.pth"), "--prompts", "red floor", ""]
    assert generate(*words, "--w", "-1", "0", "2.5", "--num_samples", "2", "--seed", "3") == 0
    (model, texts, strengths, x_T, sampler), grid = pictures
    assert texts == ["red floor", "red floor", "", ""] and strengths == [-1, 0, 2.5] and sampler is None
    assert model.num_timesteps == T and model.default_sampler.variance == "previous"
    x, cond = torch.randn(2, 3, SIZE, SIZE), torch.randn(2, WIDTH)
    with torch.no_grad():
        assert torch.equal(model.apply_model(x, torch.tensor([1, 2]), cond), network(x, torch.tensor([1, 2]), cond))
    assert grid.rows == ["red floor", "(no text)"]
    assert grid.columns == ["w = -1", "w = -1", "w = 0", "w = 0", "w = 2.5", "w = 2.5"]
    assert torch.equal(x_T[:4], x_T[4:8]) and not torch.equal(x_T[0], x_T[1])
    torch.manual_seed(3)
    assert torch.equal(x_T[:4], torch.randn(4, 3, SIZE, SIZE))


def test_rows_are_texts_and_columns_are_strengths(pictures, clip_folder, tmp_path):
    published(tmp_path / "9.pth", config={"diffusion": {"timesteps": T}})
    words = ["--clip", clip_folder, "--checkpoint", str(tmp_path / "9.pth"), "--output", str(tmp_path / "x.png")]
    assert generate(*words, "--prompts", "red floor", "blue wall", "--w", "0", "3", "--steps", "4") == 0
    (model, texts, _, x_T, sampler), grid = pictures
    assert isinstance(sampler, DDIMSampler) and sampler.num_steps == 4 and model.num_timesteps == T
    for row, text in enumerate(texts):
        for column, w in enumerate((0.0, 3.0)):
            cond = model.condition_from_texts([text])
            one = model.sample(x_T[row : row + 1], cond, sampler, guidance_scale=1 + w).clamp(-1, 1)
            torch.testing.assert_close(grid.images[2 * row + column], one[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("words", "expected"), [([], DPMSolverSampler), (["--all_steps"], type(None))])
def test_all_time_steps_are_visited_on_request(words, expected, pictures, clip_folder, tmp_path):
    published(tmp_path / "9.pth", config={"timesteps": 30})
    words = [*words, "--clip", clip_folder, "--output", str(tmp_path / "x.png"), "--prompts", "red floor"]
    assert generate("--checkpoint", str(tmp_path / "9.pth"), *words) == 0
    (model, _, _, _, sampler), _ = pictures
    assert isinstance(sampler, expected) and isinstance(model.default_sampler, DDPMSampler)
    assert sampler is None or sampler.num_steps == 20


def test_gif_of_the_denoising(clip_folder, tmp_path, capsys):
    published(tmp_path / "9.pth", config={"timesteps": 22})
    words = ["--clip", clip_folder, "--checkpoint", str(tmp_path / "9.pth"), "--output", str(tmp_path / "x.png")]
    words += [
        "--prompts",
        "red floor",
        "blue wall",
        "--w",
        "0",
        "2",
        "--gif",
        str(tmp_path / "gifs" / "x.gif"),
        "--all_steps",
    ]
    assert generate(*words) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "x.png"), str(tmp_path / "gifs" / "x.gif")]
    gif, picture = Image.open(tmp_path / "gifs" / "x.gif"), Image.open(tmp_path / "x.png")
    assert gif.n_frames == 12 and gif.size == picture.size  # t = 20, 10, 9, ..., 0
    gif.seek(11)
    last = np.asarray(gif.convert("RGB"), float)
    assert np.abs(last - np.asarray(picture, float)).mean() < 12  # 256 colors


def test_too_long_prompts_say_what_is_cut_off(clip_folder, tmp_path, caplog):
    published(tmp_path / "9.pth", config={"timesteps": T})
    words = ["--clip", clip_folder, "--checkpoint", str(tmp_path / "9.pth"), "--output", str(tmp_path / "x.png")]
    long = [" ".join(["red"] * 40 + ["blue", "wall"] + [word] * count) for word, count in (("cube", 3), ("sphere", 90))]
    assert generate(*words, "--prompts", *long, "red floor", "--steps", "2") == 0
    found = [record.getMessage() for record in caplog.records if "truncated" in record.getMessage()]
    ends = [" ".join(["red"] * 12 + ["blue", "wall"] + words) for words in (["cube"] * 3, ["sphere"] * 19 + ["..."])]
    assert found == [f"texts of more than 30 tokens are truncated, without {ends[0]!r}, {ends[1]!r} (shown once)"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkpoint", "none.pth"], "--checkpoint none.pth does not exist"),
        (["--checkpoint", "other.pth"], "expected the network of a CLIP-guided DDPM (with down0.conv1.conv.weight)"),
        (["--checkpoint", "broken.pth"], "broken.pth: damaged, truncated or not a checkpoint"),
        (["--checkpoint", "9.pth", "--sampler", "dddim"], "expected one of ddim"),
        (["--checkpoint", "9.pth", "--steps", "1000"], "expected num_steps between 2 and 400"),
        (["--checkpoint", "9.pth", "--steps", "0"], "expected num_steps between 2 and 400"),
        (["--checkpoint", "9.pth", "--config", "none.yaml"], "none.yaml does not exist"),
        (
            ["--checkpoint", "9.pth", "--device", "cuda:99"],
            "--device: expected a device of this machine, got 'cuda:99'",
        ),
        (["--checkpoint", "9.pth", "--clip", "CLIP-32"], "expected a CLIP 64 wide, as the condition of the network"),
    ],
)
def test_bad_commands_of_generate(words, message, clip_folder, tmp_path, monkeypatch, capsys):
    from ldm.models.clip import AttributeCLIP

    monkeypatch.chdir(tmp_path)
    published(tmp_path / "9.pth")
    torch.save({"model": {"a.weight": torch.zeros(2)}, "optimizer": {}, "epoch": 1}, "other.pth")
    (tmp_path / "broken.pth").write_bytes(b"damaged")
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    text = {"width": 32, "heads": 2, "layers": 1}
    AttributeCLIP(world_vocabulary().to_dict(), 32, vision, text).save_folder("CLIP-32")
    given = words if "--clip" in words else [*words, "--clip", clip_folder]
    assert generate(*given, "--prompts", "red floor") == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--w", "nan"], "--w: expected finite numbers"),
        (["--output", "x.jpg"], "--output: expected a .png file, got x.jpg"),
        (["--gif", "x.png"], "--gif: expected a .gif file, got x.png"),
        (["--num_samples", "0"], "--num_samples: expected at least 1"),
    ],
)
def test_bad_options_of_generate(words, message, capsys):
    with pytest.raises(SystemExit):
        generate("--checkpoint", "9.pth", "--prompts", "red floor", *words)
    assert message in capsys.readouterr().err


def test_models_of_another_kind_are_refused(clip_folder, tmp_path, capsys):
    unet = {"image_size": 8, "in_channels": 3, "out_channels": 3, "model_channels": 32, "num_res_blocks": 1}
    unet |= {"attention_resolutions": [], "channel_mult": [1], "num_heads": 1}
    network = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet}
    config = {"model": {"target": "ldm.models.diffusion.ddpm.DDPM", "params": {"unet_config": network}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    from ldm.models.diffusion.base import DDPM

    torch.save({"state_dict": DDPM(network).state_dict()}, tmp_path / "model.ckpt")
    assert generate("--checkpoint", str(tmp_path), "--prompts", "red floor") == 1
    assert "expected a model that samples texts under several strengths" in capsys.readouterr().err


def test_generate_needs_a_text_encoder(write, clip_folder, tmp_path, capsys, pictures):
    assert train("--config", write(epochs=1)) == 0
    run = str(next((tmp_path / "logs").iterdir()))
    words = ["--checkpoint", run, "--prompts", "red floor", "--steps", "2"]
    (tmp_path / "none.yaml").write_text("model: {params: {cond_stage_config: null}}")
    assert generate(*words, "-b", "none.yaml") == 1
    assert "expected a model with a text encoder, got none. Name its CLIP with --clip" in capsys.readouterr().err
    assert generate(*words, "-b", "none.yaml", "--clip", clip_folder) == 0
    assert generate(*words, "--config", "none.yaml") == 1
    assert "--config: expected an <epoch>.pth" in capsys.readouterr().err


def test_help_has_examples(capsys):
    for name in ("train", "generate"):
        with pytest.raises(SystemExit):
            load_script(name).main(["--help"])
        assert f"python scripts/{name}.py --" in capsys.readouterr().out
