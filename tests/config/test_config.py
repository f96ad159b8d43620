"""Merging, references, origins and checks of configs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ldm.config.loading import load_config, parse_overrides
from ldm.config.suggestions import near_class
from ldm.config.validation import validate
from ldm.util import ConfigError, UserError

GOOD = """
model:
  base_learning_rate: 1.0e-4
  target: ldm.models.diffusion.ddpm.DDPM
  params:
    ckpt_path: null
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params: {image_size: 8, in_channels: 3, model_channels: 32, out_channels: 3, num_res_blocks: 1, num_heads: 2,
               attention_resolutions: []}
data:
  target: main.DataModuleFromConfig
  params: {batch_size: 4, train: {target: ldm.data.world.World3D, params: {size: 32}}}
lightning:
  trainer: {max_epochs: 1, gpus: "0,"}
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


def make_run(folder: Path, name: str, status: str = "finished", started: str = "2026", config: str = "") -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"")
    entries = {"name": name, "status": status, "started": started, "configs": [config]}
    (folder / "run.json").write_text(json.dumps(entries))
    return folder


def check(path: Path, *overrides: str) -> None:
    validate(load_config([path], overrides))


def test_files_merge_left_to_right_and_the_command_line_wins(good: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.yaml"
    second.write_text("data: {params: {batch_size: 8}}\nmodel: {params: {timesteps: 7}}\n")
    config = load_config([good, second], ["model.params.timesteps=9", "model.base_learning_rate=1e-3"])
    assert config.content["data"]["params"]["batch_size"] == 8
    assert config.content["model"]["params"]["timesteps"] == 9
    assert config.content["model"]["base_learning_rate"] == pytest.approx(1e-3)
    assert config.origin("data.params.batch_size") == str(second)
    assert config.origin("model.params.timesteps") == "command line"
    assert config.origin("model.target") == str(good)
    validate(config)


def test_override_values_are_yaml() -> None:
    layer = parse_overrides(["a.b=1e-4", "a.c=true", "a.d=[1,2]", "a.e=null", "a.g=0,"])
    assert layer == {"a": {"b": 1e-4, "c": True, "d": [1, 2], "e": None, "g": "0,"}}
    with pytest.raises(ConfigError, match="expected key=value"):
        parse_overrides(["a"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modle.x=1", r"command line: modle: unknown key 'modle'.*'model'"),
        ("model.param.x=1", r"model.param: unknown key.*'params'"),
        ("lightning.trainer.max_epoch=1", r"unknown key 'max_epoch'.*'max_epochs'"),
        ("lightning.callback.x=1", r"lightning.callback.*'callbacks'"),
        ("lightning.logger=wandbb", r"'wandb'"),
        ("model.params.timestep=1", r"command line: model.params.timestep: .*does not accept 'timestep'.*'timesteps'"),
        ("model.params.unet_config.params.modl_channels=1", r"unet_config.params.modl_channels.*'model_channels'"),
        ("model.target=ldm.models.diffusion.ddpm.DDMP", r"no DDMP.*ddpm.DDPM"),
        ("model.target=ldm.models.difusion.ddpm.DDPM", r"no module.*ldm.models.diffusion.ddpm.DDPM"),
        ("data.target=main.DataModulFromConfig", r"'main.DataModuleFromConfig'"),
        ("data.params.train.target=ldm.data.world.dataset.Wrld3D", r"no Wrld3D.*World3D"),
        ("data.params.train.params.sise=1", r"'size'"),
        ("lightning.callbacks.image_logger.target=main.ImageLoger", r"main.ImageLogger"),
        ("model.target=null", r"model: expected a `target`"),
    ],
)
def test_slips_are_named_with_the_nearest_right_word(good: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(good, override)


@pytest.mark.parametrize(
    "override, message",
    [
        ("num_heads=-1", "unet_config.params: expected `num_heads` or `num_head_channels`, got neither"),
        ("use_spatial_transformer=true", "unet_config.params: expected both or neither of `context_dim`"),
        ("disable_self_attentions=[true]", "unet_config.params.disable_self_attentions: expected one entry for each"),
        ("model_channels=20", "unet_config.params.model_channels: expected a multiple of 32 channels, got 20"),
        ("num_head_channels=24", "unet_config.params.num_head_channels: 24 does not divide"),
    ],
)
def test_networks_that_cannot_be_built_are_refused(good: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(good, f"model.params.unet_config.params.{override}")


@pytest.mark.parametrize(
    ("target", "own", "name"),
    [
        ("ldm.data.mydata.MyTrain", "mydata", "MyTrain"),
        ("ldm.data.simple.FolderData", "simple", "FolderData"),
        ("ldm.models.diffusion.ddpm_edit.LatentDiffusion", "ddpm_edit", "LatentDiffusion"),
        ("ldm.models.diffusion.ddpm.PaintDiffusion", "my_ddpm", "PaintDiffusion"),
        ("ldm.modules.encoders.modules.FrozenT5Embedder", "my_modules", "FrozenT5Embedder"),
    ],
)
def test_classes_of_forks_are_named_as_such(good: Path, target: str, own: str, name: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(good, f"model.target={target}")
    assert "Did you mean" not in str(error.value)
    place = f"put its file outside ldm/, in the folder where the command runs (./{own}.py)"
    assert f"It is a class of a fork: {place}, " in str(error.value)
    assert str(error.value).endswith(f"and set the target to {own}.{name}")


def test_the_file_of_a_fork_is_found(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ldm" / "data").mkdir(parents=True)
    (tmp_path / "ldm" / "data" / "mydata.py").touch()
    with pytest.raises(ConfigError, match=r"copy ./ldm/data/mydata.py to ./mydata.py, outside ldm/, and set the"):
        check(good, "data.params.train.target=ldm.data.mydata.MyTrain")
    (tmp_path / "mydata.py").write_text("class MyTrain:\n    pass\n")
    with pytest.raises(ConfigError, match=r"as ./mydata.py exists, set the target to mydata.MyTrain"):
        check(good, "data.params.train.target=ldm.data.mydata.MyTrain")


@pytest.mark.parametrize(
    ("slip", "suggested"),
    [
        ("ldm.modules.diffusionmodules.openaimodel.UNetModl", "ldm.modules.diffusionmodules.openaimodel.UNetModel"),
        ("ldm.modules.encoders.modules.FrozenCLIPTextEmbeder", "ldm.modules.encoders.modules.FrozenCLIPTextEmbedder"),
        ("ldm.models.autoencoder.AutoencoderKl", "ldm.models.autoencoder.AutoencoderKL"),
        ("ldm.models.autoencoders.VQModel", "ldm.models.autoencoder.VQModel"),
        ("ldm.modules.encoders.modules.FrozenClipEmbedder2", None),
        ("ldm.modules.encoders.modules.FrozenSwinTextEmbedder", None),
        ("ldm.modules.encoders.modules.Encoder5", None),
        ("ldm.data.mydata._Rows", None),
    ],
)
def test_only_slips_are_corrected(slip: str, suggested: str | None) -> None:
    assert near_class(slip) == (f" Did you mean {suggested!r}?" if suggested else "")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.params.timesteps=many", r"model.params.timesteps: expected an integer from 1 to 1000000, got 'many'"),
        ("model.params.unet_config.params.num_heads=1.5", r"num_heads: expected an integer from .* or -1, got 1.5"),
        ("model.params.unet_config=3", r"model.params.unet_config: expected a mapping, got 3"),
        ("model.params.use_ema=maybe", r"model.params.use_ema: expected true or false, got 'maybe'"),
        ("data.params.batch_size=null", r"data.params.batch_size: expected an integer from 1 to 1000000, got None"),
        ("data.params.train.params.size=big", r"data.params.train.params.size: expected an integer from 1 to 65536"),
    ],
)
def test_values_are_compared_with_annotations(good: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(good, override)


def test_a_required_argument_is_missing(good: Path) -> None:
    good.write_text(GOOD.replace("batch_size: 4, ", ""))
    with pytest.raises(ConfigError, match=r"good.yaml: data.params: .* requires 'batch_size'"):
        check(good)


def test_a_section_is_missing(good: Path) -> None:
    good.write_text(GOOD[: GOOD.index("data:")])
    with pytest.raises(ConfigError, match="section `data` is missing"):
        check(good)


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "a: [1\n"])
def test_files_that_are_no_mapping(tmp_path: Path, text: str) -> None:
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(ConfigError, match="odd.yaml"):
        load_config([tmp_path / "odd.yaml"])


def test_a_missing_checkpoint_is_named_with_its_neighbours(good: Path, tmp_path: Path) -> None:
    (tmp_path / "vq.ckpt").write_bytes(b"")
    config = load_config([good], [f"model.params.ckpt_path={tmp_path}/vp.ckpt"])
    validate(config, check_files=False)
    with pytest.raises(UserError, match=r"command line: model.params.ckpt_path: .*vp.ckpt does not exist.*vq.ckpt"):
        validate(config)


def test_references_to_runs(good: Path, tmp_path: Path) -> None:
    old = make_run(tmp_path / "logs" / "a" / "1_vq", "vq", started="2026-01")
    new = make_run(tmp_path / "logs" / "b" / "2_vq", "vq", started="2026-02")
    make_run(tmp_path / "logs" / "3_vq", "vq", status="running", started="2026-03")
    other = make_run(tmp_path / "logs" / "4_x", "example", config="configs/auto-encoder/example.yaml")
    words = [
        "model.params.ckpt_path=${last_ckpt:vq}",
        "data.params.seed=${last_run:vq}/clip",
        "model.params.monitor=${last_run:auto_encoder/example}",
    ]
    content = load_config([good], words, roots=[tmp_path / "logs"]).content
    assert content["model"]["params"]["ckpt_path"] == str(new / "checkpoints" / "last.ckpt")
    assert content["data"]["params"]["seed"] == f"{new}/clip"
    assert content["model"]["params"]["monitor"] == str(other)
    nearer = load_config([good], words[:2], roots=[tmp_path / "logs" / "a", tmp_path / "logs"]).content
    assert nearer["data"]["params"]["seed"] == f"{old}/clip"


def test_a_run_that_does_not_exist_yet(good: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "1_clip", "clip", status="interrupted")
    words = ["model.params.ckpt_path=${last_ckpt:clip}"]
    with pytest.raises(UserError) as error:
        load_config([good], words, roots=[tmp_path])
    text = str(error.value)
    assert text.startswith("command line: model.params.ckpt_path: no finished run named 'clip'")
    assert "python main.py --base" in text
    assert f"python main.py -r {tmp_path / '1_clip'} -t" in text
    config = load_config([good], words, roots=[tmp_path], allow_pending=True)
    assert len(config.pending) == 1


def test_environment(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY", "7")
    words = ["model.params.timesteps=${env:TINY}", "model.params.channels=${env:ABSENT,5}"]
    params = load_config([good], words).content["model"]["params"]
    assert (str(params["timesteps"]), str(params["channels"])) == ("7", "5")
    with pytest.raises(ConfigError, match="ABSENT is not set"):
        load_config([good], ["model.params.channels=${env:ABSENT}"])


def test_the_fingerprint_follows_content_and_seed(good: Path) -> None:
    plain = load_config([good])
    assert plain.fingerprint(0) == load_config([good]).fingerprint(0)
    assert plain.fingerprint(0) != plain.fingerprint(1)
    assert plain.fingerprint(0) != load_config([good], ["model.params.timesteps=3"]).fingerprint(0)


def test_a_file_builds_on_others(tmp_path: Path) -> None:
    """They come first, each once, relative to the file that names them; the last word has the file itself."""
    for name, text in {
        "parts/root_part.yaml": "model: {params: {a: root, b: root, c: root, d: root}}",
        "parts/left.yaml": "base: root-part.yaml\nmodel: {params: {b: left, c: left}}",
        "parts/right.yaml": "base: [root_part.yaml]\nmodel: {params: {c: right}}",
        "own/own.yaml": "base: [../parts/left.yaml, ../parts/right.yaml]\nmodel: {params: {d: own}}",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    config = load_config([tmp_path / "own" / "own.yaml"], ["model.params.e=x"])
    assert config.content == {"model": {"params": {"a": "root", "b": "left", "c": "right", "d": "own", "e": "x"}}}
    assert config.files == (str(tmp_path / "own" / "own.yaml"),)
    assert config.origin("model.params.b") == str(tmp_path / "parts" / "left.yaml")
    assert config.origin("model.params.d") == str(tmp_path / "own" / "own.yaml")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("base: [other.yaml]", ConfigError, r"base: circular include: .*own.yaml -> .*other.yaml -> .*own.yaml"),
        ("base: own.yaml", ConfigError, r"own.yaml: base: .*circular include: .*own.yaml -> .*own.yaml"),
        ("base: [othr.yaml]", UserError, r"own.yaml: base: .*othr.yaml does not exist. Similar: .*other.yaml"),
        ("base: {a: b}", ConfigError, r"own.yaml: base: expected a list of YAML files.*\{'a': 'b'\}"),
        ("base: [1]", ConfigError, r"expected a list of YAML files"),
        ("bases: [other.yaml]", ConfigError, r"own.yaml: bases: unknown key 'bases'. Did you mean 'base'"),
    ],
)
def test_slips_in_naming_other_files(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    (tmp_path / "other.yaml").write_text("base: [own.yaml]")
    with pytest.raises(error, match=message):
        check(tmp_path / "own.yaml")


def test_files_are_not_named_in_an_override(good: Path) -> None:
    with pytest.raises(ConfigError, match="command line: base cannot.*-b/--base"):
        check(good, "base=[x.yaml]")


def test_a_model_alone_can_be_checked(good: Path) -> None:
    good.write_text(GOOD[: GOOD.index("data:")])
    validate(load_config([good]), sections=("model",))
    with pytest.raises(ConfigError, match="does not accept 'timestep'"):
        validate(load_config([good], ["model.params.timestep=1"]), sections=("model",))


def test_one_blank_too_many(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A published config has such a line; anything else that is no YAML stays an error."""
    path = tmp_path / "slip.yaml"
    path.write_text("model:\n  ddconfig:\n    ch: 32\n     ch_mult: [1, 2]  # slip\n    out_ch: 3\n")
    assert load_config([path]).content == {"model": {"ddconfig": {"ch": 32, "ch_mult": [1, 2], "out_ch": 3}}}
    assert "slip.yaml: line 4 is indented one space further" in caplog.text
    for text in ("a:\n  b: 1\n    c: 2\n", "a: 1\n b: [\n", "a: 1\n b: 2\n c: 3\n"):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"(?s)slip.yaml cannot be read as YAML: .*line"):
            load_config([path])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("base_learning_rate=1e-5", "unknown key 'base_learning_rate'. Move it to model.base_learning_rate"),
        ("trainer.max_steps=2", "unknown key 'trainer'. Move it to lightning.trainer"),
        ("modle.target=x", "unknown key 'modle'. Did you mean 'model'? Accepted: base, model, data, lightning"),
        ("model.params.unet_trainable=attn", "does not accept 'unet_trainable'. Accepted: "),
        ("model.params.reg_weight=1", "does not accept 'reg_weight'. Accepted: "),
    ],
)
def test_advice_about_unknown_keys(good: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(good, override)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("shares", "part", "key"),
    [
        ((0.1, 0.1, 0.1), "validation", None),
        ((0.1, 0.1, 0.0), None, None),  # the whole set, for metrics
        ((0.0, 0.0, 0.0), "evaluation", None),
        ((0.1, 0.0, 0.1), "validation", "validation"),
        ((0.0, 0.1, 0.0), "validation", "validation"),
        ((0.1, 0.1, 0.2), None, "test"),
        ((0.1, 0.1, 0.0), "evaluation", "test"),
    ],
)
def test_all_data_hold_out_the_same_combinations(good: Path, shares: tuple, part: str | None, key: str | None) -> None:
    """Otherwise images or combinations of training count as unseen."""
    target, sections = "ldm.data.world.World3D", {}
    for name, split, share in zip(("train", "validation", "test"), ("train", "validation", part), shares):
        sections[name] = {"target": target, "params": {"size": 32, "split": split, "holdout": share}}
    words = [f"data.params.{name}={json.dumps(section)}" for name, section in sections.items()]
    if key is None:
        return check(good, *words)
    with pytest.raises(ConfigError, match=rf"data.params.{key}.params.holdout: expected {shares[0]:g}, as in"):
        check(good, *words)
