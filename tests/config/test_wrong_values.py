"""Wrong values and misspelt keys of configs and command lines: one line with the key, by the check and by -t."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import main as front_door
from ldm.config.signatures import find_misfit, read_signature
from ldm.config.trainer_args import misfit_of
from ldm.diffusion.samplers import SAMPLERS
from ldm.training.cli import Options, parse_arguments
from ldm.training.recipe import load_recipe
from ldm.util import ConfigError, mismatch

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart"
BASE = ["--base", str(QUICKSTART / "world.yaml"), str(QUICKSTART / "vq.yaml")]
TRAINER, PICTURES = "lightning.trainer", "lightning.callbacks.image_logger.params"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.pparams.x=1", "model.pparams: unknown key 'pparams'. Did you mean 'params'?"),
        ("model.params.lossconfig.taregt=a.B", "lossconfig.taregt: unknown key 'taregt'. Did you mean 'target'?"),
        ("model.params.lossconfig.parms.x=1", "lossconfig.parms: unknown key 'parms'. Did you mean 'params'?"),
        ("data.params.train.weight=1", "data.params.train.weight: unknown key 'weight'. Accepted: target, params"),
        ("data.params.train=null", "data.params.train: expected a mapping with target and params, got None"),
        ("model.base_learning_rate=abc", "model.base_learning_rate: expected a number above 0 and at most 10"),
        ("model.base_learning_rate=-1e-4", "model.base_learning_rate: expected a number above 0 and at most 10"),
        ("model.base_learning_rate=.nan", "model.base_learning_rate: expected a number above 0 and at most 10"),
        ("data.params.batch_size=0", "data.params.batch_size: expected an integer from 1 to 1000000, got 0"),
        ("model.params.n_embed=-4", "model.params.n_embed: expected an integer from 1 to 1000000, got -4"),
        ("model.params.lossconfig.params.disc_start=.nan", "disc_start: expected a number of at least 0, got nan"),
        ("model.params.lossconfig.params.disc_weight=-1", "disc_weight: expected a number from 0 to 1000000, got -1"),
        ("data.params.train.params.holdout=1.0", "holdout: expected a number of at least 0 and below 1, got 1.0"),
        ("data.params.train.params.seed=-1", "seed: expected an integer from 0 to 4294967295, got -1"),
        (f"{PICTURES}.batch_frequency=0", f"{PICTURES}.batch_frequency: expected a number above 0, got 0"),
        (f"{PICTURES}.log_images_kwargs.N=-1", "log_images_kwargs.N: expected an integer from 1 to 1000000, got -1"),
        (f"{PICTURES}.log_images_kwargs.inpiant=false", "does not accept 'inpiant'. Did you mean 'inpaint'?"),
        ("lightning.callbacks.own=3", "lightning.callbacks.own: expected a mapping with target, params, got 3"),
        ("lightning.callbacks.own.params.x=3", "lightning.callbacks.own: expected a `target`"),
        ("lightning.modelcheckpoint.params.save_top_k=-5", "save_top_k: expected an integer from 0 to 1000000 or -1"),
        (
            "lightning.modelcheckpoint.params.every_n_train_steps=-1",
            "expected an integer of at least 0 or null, got -1",
        ),
        (f"{TRAINER}.accumulate_grad_batches=0", "accumulate_grad_batches: expected an integer from 1 to 1000000"),
        (f"{TRAINER}.accumulate_grad_batches={{a: 2}}", "accumulate_grad_batches: expected an integer"),
        (f"{TRAINER}.val_check_interval=0", f"{TRAINER}.val_check_interval: expected"),
        (f"{TRAINER}.val_check_interval=often", f"{TRAINER}.val_check_interval: expected a time"),
        (
            f"{TRAINER}.max_epochs=ten",
            f"{TRAINER}.max_epochs: expected an integer of at least 1 or -1 or null, got 'ten'",
        ),
        (f"{TRAINER}.max_epochs=-5", f"{TRAINER}.max_epochs: expected an integer of at least 1 or -1 or null, got -5"),
        (f"{TRAINER}.precision=bf61", "got 'bf61'. Did you mean 'bf16'?"),
        (f"{TRAINER}.accelerator=cpuu", "got 'cpuu'. Did you mean 'cpu'?"),
        (f"{TRAINER}.devices=x", f"{TRAINER}.devices: expected device indices"),
        (f"{TRAINER}.benchmark=maybe", f"{TRAINER}.benchmark: expected true or false or null, got 'maybe'"),
        (f"{TRAINER}.gradient_clip_val=-1", f"{TRAINER}.gradient_clip_val: expected a number from 0"),
        (f"{TRAINER}.max_time=abc", f"{TRAINER}.max_time: expected a time"),
    ],
)
def test_values_and_keys(capsys: pytest.CaptureFixture, tmp_path: Path, word: str, message: str) -> None:
    for words in ([], ["-t", "-l", str(tmp_path)]):
        assert front_door.main([*BASE, word, *words]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and message in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "word",
    ["max_steps=1e5", "min_steps=2", "precision=16", "precision=bf16", "val_check_interval=0.5", "max_time=00:01:00:00"]
    + ["limit_val_batches=0", "accumulate_grad_batches=null", "gradient_clip_val=0", "num_sanity_val_steps=-1"],
)
def test_valid_values(word: str) -> None:
    assert front_door.main([*BASE, f"{TRAINER}.{word}"]) == 0


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("FrozenCLIPEmbedder", {"layer": "hidden", "layer_idx": -2}),
        ("SpatialRescaler", {"n_stages": 0}),
        ("BERTEmbedder", {"n_embed": 640, "n_layer": 32, "embedding_dropout": 0}),
    ],
)
def test_values_of_the_family_are_accepted(name: str, params: dict[str, Any]) -> None:
    target = f"ldm.modules.encoders.modules.{name}"
    assert find_misfit(target, params, read_signature(target)) is None


@pytest.mark.parametrize("name", ["terminate_on_nan", "checkpoint_callback", "replace_sampler_ddp"])
def test_null_is_accepted_for_options_of_lightning_1(name: str) -> None:
    assert misfit_of(name, None) == ""


def test_accelerators_of_other_machines(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert front_door.main([*BASE, "--accelerator", "tpu", "-t", "-l", str(tmp_path)]) == 1
    assert (
        "lightning.trainer.accelerator: expected an accelerator of this machine, got 'tpu'" in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", ["-1", "1e3", "abc", "4294967296"])
def test_seeds(seed: str) -> None:
    with pytest.raises(ConfigError, match="seed: expected an integer from 0 to 4294967295, got"):
        parse_arguments(["--base", "a.yaml", "-s", seed])


def test_keys_that_are_given_twice(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "twice.yaml").write_text("model:\n  target: x\n  target: y\n")
    assert front_door.main(["--base", str(tmp_path / "twice.yaml")]) == 1
    error = capsys.readouterr().err
    assert "found duplicate key target" in error and "line 3" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{name: a, stages: [{name: x, base: 3}]}", "stages.0.base: expected a list, got 3"),
        ("{name: a, stages: [{name: x, base: [3]}]}", "stages.0.base: expected a list, each entry a text, got"),
        ("{name: a, stages: [{name: x/y, base: [b]}]}", "stages.0.name: expected a name without /"),
        ("{name: a/b, stages: [{name: x, base: [b]}]}", "name: expected a name without /"),
        ("{name: a, stages: [{name: x, base: [b], overrides: {c: 1}}]}", "stages.0.overrides: expected a list or null"),
        ("{name: a, seed: abc, stages: [{name: x, base: [b]}]}", "seed: expected an integer from 0 to 4294967295"),
        (
            "{name: a, score: {processes: 0}, stages: [{name: x, base: [b]}]}",
            "score.processes: expected an integer from",
        ),
        ("{name: a, stages: many}", "stages: expected a list, got 'many'"),
    ],
)
def test_recipes(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_recipe(Options(recipe=str(tmp_path / "recipe.yaml")))
    assert message in str(error.value)


DIFFUSION = ["--base", *(str(QUICKSTART / f"{name}.yaml") for name in ("world", "latents", "ldm"))]
UNET, KWARGS = "model.params.unet_config.params", f"{PICTURES}.log_images_kwargs"
DDIM = "{target: ldm.diffusion.samplers.DDIMSampler, params: {num_steps: 5000}}"
SCORE = "{target: ldm.evaluation.editing.callback.EditScore, params: {judge: x, sampler: %s}}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([f"{KWARGS}.sampler={DDIM}"], "num_steps: expected 2 to 1000 (the model's timesteps), got 5000"),
        ([f"{KWARGS}.sampler={DDIM.replace('5000', '1')}"], "num_steps: expected 2 to 1000 (the model's timesteps)"),
        ([f"{KWARGS}.sampler={DDIM.replace('num_steps: 5000', 'eta: 5')}"], "eta: expected a number from 0"),
        ([f"{KWARGS}.sampler=didm"], "sampler: expected ddim, ddpm, plms, dpm_solver, got 'didm'"),
        (
            [f"lightning.callbacks.edit={SCORE.replace('sampler: %s', 'ddim_steps: 1001')}"],
            "edit.params.ddim_steps: expected 2 to 1000 (the model's timesteps)",
        ),
        ([f"{KWARGS}.ddim_steps=20"], "log_images_kwargs: expected `sampler` or ddim_steps, got both"),
        ([f"{KWARGS}.ddim_eta=2"], "log_images_kwargs.ddim_eta: expected a number from 0"),
        (
            ["model.params.timesteps=20", f"model.params.sampler={DDIM}"],
            "model.params.sampler.params.num_steps: expected",
        ),
        (["model.params.sampler=ddmp"], "model.params.sampler: expected ddim"),
        ([f"lightning.callbacks.edit={SCORE % DDIM}"], "edit.params.sampler.params.num_steps: expected 2 to 1000"),
        ([f"lightning.callbacks.edit={SCORE % 'plsm'}"], "edit.params.sampler: expected ddim"),
        (
            ["model.params.timesteps=9", "model.params.given_betas=[0.1,0.2]"],
            "given_betas: expected 9 entries (timesteps)",
        ),
        (["model.params.linear_start=0.03", "model.params.linear_end=0.02"], "linear_start: expected at most 0.02"),
        (["model.params.conditioning_key=crossatn"], "conditioning_key: expected concat, crossattn, hybrid, adm"),
        (["model.params.beta_schedule=linaer"], "got 'linaer'. Did you mean 'linear'?"),
        (["model.params.loss_type=l3"], "model.params.loss_type: expected l1, l2, got 'l3'"),
        (["model.params.parameterization=noise"], "model.params.parameterization: expected eps, x0, v, got 'noise'"),
        ([f"{UNET}.channel_mult=[]"], "channel_mult: expected at least one level, got []"),
        (
            [f"{TRAINER}.strategy=ddp_spwan"],
            "strategy: expected a strategy of Lightning, got 'ddp_spwan'. Did you mean",
        ),
        ([f"{TRAINER}.max_steps=1.5"], "max_steps: expected an integer of at least 1 or -1 or null, got 1.5"),
        ([f"{TRAINER}.max_epochs=.inf"], "max_epochs: expected an integer of at least 1"),
    ],
)
def test_options_of_diffusion(capsys: pytest.CaptureFixture, words: list[str], message: str) -> None:
    assert front_door.main([*DIFFUSION, *words]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


@pytest.mark.parametrize(
    "words",
    [
        [f"{KWARGS}.sampler={DDIM.replace('5000', '1000')}"],
        [f"{KWARGS}.sampler=plms"],
        [f"{KWARGS}.sampler=null", "model.params.sampler=ddim"],
        ["model.params.sampler=own.samplers.Fast"],
        ["model.params.given_betas=[0.1,0.2]", "model.params.timesteps=2", f"{KWARGS}.sampler=ddpm"],
        ["model.params.beta_schedule=cosine", "model.params.linear_start=0.5"],
        *(
            [f"{TRAINER}.strategy={name}"]
            for name in ("ddp_notebook", "deepspeed_stage_2", "own", "own.Strategy", "auto")
        ),
    ],
)
def test_valid_options_of_diffusion(words: list[str]) -> None:
    assert front_door.main([*DIFFUSION, *words]) == 0


@pytest.mark.parametrize(("rates", "count"), [("[64]", 1), ("[1,64]", 0), ("[]", 0)])
def test_attention_that_no_level_has(caplog: pytest.LogCaptureFixture, rates: str, count: int) -> None:
    assert front_door.main([*DIFFUSION, f"{UNET}.attention_resolutions={rates}"]) == 0
    assert caplog.text.count("attention_resolutions: no level has attention") == count


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("text_cfg.heads=5", "text_cfg.heads: expected a divisor of"),
        ("text_cfg.layers=[3]", "text_cfg.layers: expected an integer from 1 to 1000000, got [3]"),
        ("vision_cfg.patch_size=7", "vision_cfg.patch_size: expected a divisor of"),
    ],
)
def test_networks_of_a_clip(capsys: pytest.CaptureFixture, word: str, message: str) -> None:
    base = ["--base", *(str(QUICKSTART / f"{name}.yaml") for name in ("world", "clip"))]
    assert front_door.main([*base, f"model.params.{word}"]) == 1
    assert f"model.params.{message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("ddconfig.ch_mult=[]", "ddconfig.ch_mult: expected at least one level, got []"),
        ("lossconfig.params.pixel_loss=l3", "lossconfig.params.pixel_loss: expected l1, l2, got 'l3'"),
        ("lossconfig.params.disc_loss=hing", "got 'hing'. Did you mean 'hinge'?"),
    ],
)
def test_options_of_a_first_stage(capsys: pytest.CaptureFixture, word: str, message: str) -> None:
    assert front_door.main([*BASE, f"model.params.{word}"]) == 1
    assert message in capsys.readouterr().err


def test_names_of_samplers_in_the_check_are_those_of_samplers() -> None:
    assert mismatch("SamplerName", "").startswith(f"expected {', '.join(SAMPLERS)}, got")
