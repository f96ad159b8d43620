"""The commands of NoiseCLR's reference code: training from its config, and saving of a pipeline."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from omegaconf import OmegaConf
from PIL import Image
from script_modules import load_script
from stable_diffusion_pipeline import WIDTH, compvis_config, compvis_weights, save_pipeline

import main as front_door
from ldm.diffusion.directions import Edit
from ldm.diffusion.samplers import DDIMSampler
from ldm.legacy.noiseclr import read_assignments, training_words
from ldm.models.diffusion.methods.noiseclr.directions import DirectionSet
from ldm.models.diffusion.methods.noiseclr.files import save_pipeline as save_with_tokens
from ldm.models.diffusion.methods.noiseclr.pipeline import PipelineDenoiser, load_pipeline
from ldm.util import ConfigError, instantiate_from_config

# Keys and values of the reference's configs/base_config.py, with small sizes.
BASE = {
    "save_steps": 2,
    "pretrained_model": "",
    "tokenizer_name": None,
    "train_data_dir": "",
    "placeholder_token_count": 5,
    "initializer_tokens": "",
    "repeats": 1,
    "output_dir": "outputs/directions",
    "seed": 0,
    "center_crop": False,
    "train_batch_size": 3,
    "tokens_per_iter": 2,
    "num_train_iters": 3,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True,
    "scale_lr": True,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "resolution": 16,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_weight_decay": 1e-2,
    "adam_epsilon": 1e-08,
    "learning_rate": 1e-3,
    "temperature": 0.5,
    "logging_dir": "logs",
    "mixed_precision": "no",
    "resume_from_checkpoint": None,
    "resume_dir": None,
    "normalize_word": False,
    "enable_xformers_memory_efficient_attention": True,
    "validation_step": 100,
    "subtract_uncond": True,
    "checkpointing_steps": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("diffusers") / "pipeline")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for k in range(7):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(root / f"{k}.png")
    return root


@pytest.fixture
def write(tmp_path, monkeypatch, folder, images):
    """Writes a config in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def write(name="base_config.py", **changes):
        values = {**BASE, "pretrained_model": str(folder), "train_data_dir": str(images), **changes}
        lines = "\n".join(f"{key} = {value!r} # a comment" for key, value in values.items())
        (tmp_path / name).write_text(lines if name.endswith(".py") else yaml.safe_dump(values))
        return str(tmp_path / name)

    return write


def train(*words):
    return load_script("train").main(["--model_config_path", *words])


def save(*words):
    return load_script("load_and_save_model").main([*words])


@pytest.mark.slow
def test_noiseclr_trains_from_the_config_of_the_reference_saves_loads_and_edits(write, folder, tmp_path, caplog):
    pipeline = load_pipeline(str(folder))
    before = {name: value.clone() for name, value in pipeline.text_encoder.state_dict().items()}
    with caplog.at_level("INFO"):
        assert train(write(), "--accelerator", "cpu", "data.params.num_workers=0") == 0
    assert "subtract_uncond is ignored" in caplog.text and "enable_xformers" in caplog.text
    assert "learning rate 0.002 = 2 (accumulate) x 1 (devices) x 3 (batch size)" in caplog.text
    (run,) = (tmp_path / "outputs").iterdir()
    assert run.name.endswith("_directions")
    checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert checkpoints == ["last.ckpt", "step=000000002.ckpt"]
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    assert list(state) == ["rows"]

    directions = DirectionSet.load(run)
    assert (len(directions), directions.kind, directions.names[4]) == (5, "token", "<t5>")
    assert torch.equal(directions.values, state["rows"])
    embeds = torch.load(run / "learned_embeds.bin", weights_only=True)
    assert torch.equal(torch.stack(list(embeds.values())), directions.values)
    earlier = DirectionSet.load(run / "checkpoints" / "step=000000002.ckpt")
    assert (earlier.values - directions.values).norm(dim=1).max() > 0

    denoiser, sampler = PipelineDenoiser(str(folder)), DDIMSampler(3)
    directions.check(denoiser)
    denoise = directions.edited(denoiser, [Edit(0, 5.0), Edit(4, -5.0, 1)], sampler, 2)
    assert torch.isfinite(sampler.sample(denoise, torch.randn(2, 4, 8, 8), denoiser.schedule)).all()

    assert (
        save("--ckpt_path", str(run), "--save_path", "a/faces", "--num_tokens", "5", "--pretrained_model", str(folder))
        == 0
    )
    saved = StableDiffusionPipeline.from_pretrained("a/faces")
    table = saved.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[saved.tokenizer.convert_tokens_to_ids("<t1>")], directions.values[0])
    after = saved.text_encoder.state_dict()
    assert all(torch.equal(value, after[name][: len(value)]) for name, value in before.items())
    assert save("--ckpt_path", "a/faces", "--save_path", "faces.safetensors") == 0
    assert torch.equal(DirectionSet.load("faces.safetensors").values, directions.values)

    resumed = write(resume_from_checkpoint="latest", resume_dir=str(run), num_train_iters=5)  # one with gradients
    assert train(resumed, "--accelerator", "cpu", "data.params.num_workers=0") == 0
    assert not torch.equal(DirectionSet.load(run).values, directions.values)


def test_noiseclr_saves_a_pipeline_from_a_checkpoint_of_accelerate(folder, tmp_path, capsys):
    state = load_pipeline(str(folder)).text_encoder.state_dict()
    (key,) = (key for key in state if "token_embedding" in key)
    rows = torch.randn(4, WIDTH)
    state[key] = torch.cat([state[key], rows])
    torch.save(state, tmp_path / "pytorch_model.bin")
    words = ["--ckpt_path", str(tmp_path / "pytorch_model.bin"), "--save_path", str(tmp_path / "faces")]
    words += ["--pretrained_model", str(folder)]
    assert save(*words, "--num_tokens", "5") == 1
    assert "expected 5 directions (num_tokens), got 4" in capsys.readouterr().err
    assert not (tmp_path / "faces").exists()
    assert save(*words, "--num_tokens", "4") == 0
    assert torch.equal(DirectionSet.load(tmp_path / "faces").values, rows)
    assert save(*words[:2], "--save_path", str(tmp_path / "learned_embeds.bin"), "--num_tokens", "4") == 0
    assert torch.equal(DirectionSet.load(tmp_path / "learned_embeds.bin").values, rows)
    assert save(*words, "--num_tokens", "4", "--pretrained_model", str(tmp_path / "none")) == 1
    assert "none: expected the folder of a complete pipeline" in capsys.readouterr().err
    assert (
        save(
            "--ckpt_path",
            str(tmp_path / "faces"),
            "--save_path",
            str(tmp_path / "b"),
            *words[4:5],
            str(tmp_path / "faces"),
        )
        == 1
    )
    assert "expected a tokenizer without the tokens to be learned" in capsys.readouterr().err


def test_noiseclr_trains_on_a_checkpoint_in_compvis_layout(write, folder, images, tmp_path):
    write()
    pipeline = load_pipeline(str(folder))
    OmegaConf.save(OmegaConf.create({"model": compvis_config(tmp_path / "clip")}), tmp_path / "sd.yaml")
    torch.save({"state_dict": compvis_weights(pipeline)}, tmp_path / "sd.ckpt")
    root = load_script("train").ROOT
    words = ["-b", f"{root}/configs/directions/compvis.yaml", "-t", "-n", "x", "--accelerator", "cpu", "-s", "0"]
    denoiser = "model.params.denoiser_config.params"
    words += [f"{denoiser}.run=sd.ckpt", f"{denoiser}.base=[sd.yaml]", f"data.params.train.params.path={images}"]
    words += ["data.params.batch_size=3", "data.params.num_workers=0", "data.params.train.params.image_size=16"]
    words += ["model.params.num_directions=5", "model.params.directions_per_iteration=2", "--max_steps", "1"]
    assert front_door.main(words) == 0
    (run,) = (tmp_path / "logs").iterdir()
    assert len(DirectionSet.load(run)) == len(DirectionSet.load(run / "learned_embeds.bin")) == 5


def test_noiseclr_config_of_the_reference_is_translated(write):
    words, flags = training_words(read_assignments(write(initializer_tokens="face, smile", center_crop=True)), "x.py")
    found = OmegaConf.create()
    for word in words:
        key, _, value = word.partition("=")
        OmegaConf.update(found, key, yaml.safe_load(value))
    params = found.model.params
    assert flags == {"-s": "0", "-l": "outputs", "-n": "directions"}
    assert params.initializer_tokens == ["face", "smile"] and params.betas == [0.9, 0.999]
    assert (params.num_directions, params.directions_per_iteration, params.scheduler_config) == (5, 2, None)
    assert found.model.base_learning_rate == pytest.approx(1e-3 / 3) and found.lightning.scale_lr
    assert found.data.params.train.params.fit == "crop" and found.data.params.train.params.image_size == 16
    assert found.lightning.trainer.precision == "32-true"
    for precision, ours in (("fp16", "16-mixed"), ("bf16", "bf16-mixed")):
        assert f'lightning.trainer.precision="{ours}"' in training_words({"mixed_precision": precision}, "x.py")[0]
    words, flags = training_words({"scale_lr": False, "learning_rate": 5e-4}, "folder/x.yaml")
    assert "model.base_learning_rate=0.0005" in words and "lightning.scale_lr=false" in words and flags == {"-n": "x"}


def test_noiseclr_yaml_config_gives_the_same_words(write):
    with open(write("base_config.yaml")) as stream:
        words, flags = training_words(yaml.safe_load(stream), "x.yaml")
    expected, expected_flags = training_words(read_assignments(write()), "x.yaml")
    assert sorted(words) == sorted(expected) and flags == expected_flags


@pytest.mark.parametrize(
    "name, expected",
    [
        ("constant_with_warmup", [0, 0.5, 1, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [0, 0.5, 1, 0.8536, 0.5, 0.1464, 0]),
        ("cosine_with_restarts", [0, 0.5, 1, 0.8536, 0.5, 0.1464, 0]),
    ],
)
def test_noiseclr_learning_rate_schedules_of_the_reference(name, expected):
    for warm_up in (2, 0):
        config = {"lr_scheduler": name, "lr_warmup_steps": warm_up, "num_train_iters": 4 + warm_up}
        (word,) = (word for word in training_words(config, "x")[0] if "scheduler_config" in word)
        factor = instantiate_from_config(yaml.safe_load(word.partition("=")[2]))
        assert [factor(step) for step in range(5 + warm_up)] == pytest.approx(expected[2 - warm_up :], abs=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"learning_rates": 1.0}, "unknown key 'learning_rates'. Did you mean 'learning_rate'?"),
        ({"lr_scheduler": "polynomial"}, "lr_scheduler: expected one of constant, .*, got 'polynomial'"),
        ({"mixed_precision": "fp8"}, "mixed_precision: expected one of no, fp16, bf16, got 'fp8'"),
        ({"train_batch_size": 0}, "train_batch_size: expected a number of at least 1, got 0"),
        ({"learning_rate": "fast"}, "learning_rate: expected a number of at least 0, got 'fast'"),
        ({"save_steps": None}, "save_steps: expected a number of at least 1, got None"),
        ({"resume_from_checkpoint": "latest"}, "resume_dir: expected the folder of a run"),
    ],
)
def test_noiseclr_bad_values_are_named(changes, message):
    with pytest.raises(ConfigError, match=rf"x.py: {message}"):
        training_words(changes, "x.py")


def test_noiseclr_configs_are_not_executed(tmp_path):
    path = tmp_path / "config.py"
    for line in ("import os", "seed = open('x', 'w')", "f()", "a, b = 1, 2", "x.y = 1", "seed: int", "seed += 1"):
        path.write_text(f'"""A config."""\ntemperature = 0.5\n{line}\n')
        with pytest.raises(ConfigError, match="line 3: expected NAME = "):
            read_assignments(str(path))
    assert list(tmp_path.iterdir()) == [path]
    path.write_text("seed = ")
    with pytest.raises(ConfigError, match="invalid syntax"):
        read_assignments(str(path))
    path.write_text('"""A config."""\nseed: int = -1\nadam_beta1 = 0.5\nadam_beta1 = 0.9\nwords = ["a"]')
    assert read_assignments(str(path)) == {"seed": -1, "adam_beta1": 0.9, "words": ["a"]}
    with pytest.raises(ConfigError, match="expected a config, got none"):
        read_assignments(str(tmp_path / "missing.py"))


def test_noiseclr_bad_input_of_training(write, folder, images, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    with_tokens = tmp_path / "with_tokens"
    save_with_tokens(with_tokens, {"<t5>": torch.ones(WIDTH), "<t6>": torch.ones(WIDTH)}, load_pipeline(str(folder)))
    cases = [
        ({"train_data_dir": str(tmp_path / "empty")}, r"empty: expected images"),
        ({"train_data_dir": str(tmp_path / "missing")}, r"missing: expected a folder of images"),
        ({"tokens_per_iter": 5}, r"directions_per_iteration: expected 1 to 4"),
        ({"pretrained_model": str(tmp_path / "missing")}, r"expected the folder of a complete pipeline"),
        ({"pretrained_model": str(with_tokens)}, r"without the tokens to be learned, got one with <t5>"),
        ({"train_batch_size": 1}, r"data.params.batch_size: expected at least 2 images"),
        ({"resume_from_checkpoint": "checkpoint-2", "resume_dir": str(images)}, r"checkpoint-2"),
    ]
    for changes, message in cases:
        assert train(write(**changes), "--accelerator", "cpu", "data.params.num_workers=0") == 1
        error = capsys.readouterr().err
        assert re.search(message, error), error
    with pytest.raises(SystemExit):
        load_script("train").main(["--config", "a.yaml", "--model_config_path", "b.py"])
    with pytest.raises(SystemExit):
        load_script("train").main([])
