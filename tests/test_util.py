"""Building objects from configs, old names included; files that are whole or untouched."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from legacy_configs import MODELS
from omegaconf import OmegaConf

from ldm.config.signatures import read_signature
from ldm.legacy import ALIASES, resolve_target
from ldm.util import (
    BuildError,
    ConfigError,
    MissingTargetError,
    UserError,
    atomic_write,
    get_obj_from_str,
    instantiate_from_config,
    load_config,
    mismatch,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture
def standard_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept targets of the standard library."""
    monkeypatch.setenv("LDM_ALLOW_TARGETS", "fractions,collections")


@pytest.mark.usefixtures("standard_library")
def test_building() -> None:
    assert instantiate_from_config({"target": "fractions.Fraction", "params": {"numerator": 3}}, denominator=4) == 0.75
    assert instantiate_from_config({"target": "collections.OrderedDict", "params": None}) == {}


@pytest.mark.parametrize("text", ["__is_first_stage__", "__is_unconditional__"])
def test_placeholders(text: str) -> None:
    assert instantiate_from_config(text) is None


def test_a_missing_target_is_a_key_error_as_in_ldm() -> None:
    with pytest.raises(KeyError) as error:
        instantiate_from_config({"params": {}})
    assert isinstance(error.value, MissingTargetError)
    assert "`target`" in str(error.value)


@pytest.mark.parametrize("config", [None, "ldm", 3])
def test_what_is_no_config(config: object) -> None:
    with pytest.raises(ConfigError, match="expected a mapping"):
        instantiate_from_config(config)


@pytest.mark.usefixtures("standard_library")
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("fractions.Fractoin", "'Fraction'"),
        ("fraction.Fraction", "no module 'fraction'"),
        ("Fraction", "expected a dotted path"),
        ("ldm.nothing.Here", "no module 'ldm.nothing'"),
    ],
)
def test_wrong_targets(target: str, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        get_obj_from_str(target)


def test_a_module_that_needs_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("import a_missing_package\n\nclass Thing: ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="needs the package 'a_missing_package'"):
        get_obj_from_str("needs_more.Thing")


@pytest.mark.usefixtures("standard_library")
def test_wrong_arguments_list_the_right_ones() -> None:
    with pytest.raises(BuildError, match=r"'numerater'.*Did you mean 'numerator'.*Accepted: numerator, denominator"):
        instantiate_from_config({"target": "fractions.Fraction", "params": {"numerater": 1}})


def test_an_error_inside_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "breaks.py").write_text(
        "class Built:\n    def __init__(self, x=1):\n        raise TypeError('inside')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BuildError, match="TypeError: inside .*breaks.py, line 3") as error:
        instantiate_from_config({"target": "breaks.Built"})
    assert isinstance(error.value.__cause__, TypeError)


@pytest.mark.parametrize("old", sorted(name for name in ALIASES if name.startswith(("main", "pytorch_lightning"))))
def test_old_names_lead_somewhere(old: str) -> None:
    assert read_signature(resolve_target(old)) is not None


def test_todays_names_stay() -> None:
    assert resolve_target("ldm.models.autoencoder.VQModel") == "ldm.models.autoencoder.VQModel"
    assert resolve_target("lightning.pytorch.callbacks.Timer") == "pytorch_lightning.callbacks.Timer"


def test_a_file_is_whole_or_untouched(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    with atomic_write(path) as stream:
        stream.write("whole")
    with pytest.raises(ArithmeticError), atomic_write(path) as stream:
        stream.write("half")
        raise ArithmeticError
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_config_is_loaded_in_one_call(tmp_path: Path) -> None:
    """A shipped config that uses ``base:`` and ``${last_ckpt:...}`` builds its data module."""
    path = Path(__file__).parents[1] / "configs" / "latent-diffusion" / "shapes3d-vq-4-16-dis.yaml"
    config = load_config(path, ["data.params.num_workers=0"], roots=[tmp_path])
    assert type(config) is dict and type(config["model"]["params"]["unet_config"]) is dict
    assert config["model"]["params"]["first_stage_config"]["params"]["ckpt_path"].startswith("<last_ckpt ")
    data = instantiate_from_config(config["data"])
    assert (type(data).__name__, data.batch_size) == ("DataModuleFromConfig", 128)
    assert load_config([path, path], roots=[tmp_path])["data"]["params"]["batch_size"] == 128


@pytest.mark.parametrize("section", ["model", "data"])
def test_a_raw_config_with_base_is_explained(tmp_path: Path, section: str) -> None:
    (tmp_path / "own.yaml").write_text("base: [x.yaml]\nmodel: {params: {a: 1}}\n")
    with pytest.raises(ConfigError, match="have to be loaded with ldm.util.load_config"):
        instantiate_from_config(OmegaConf.load(tmp_path / "own.yaml").get(section))


def test_a_raw_config_with_a_reference_is_explained(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text('target: fractions.Fraction\nparams: {numerator: "${no_such_resolver:vq}"}\n')
    with pytest.raises(ConfigError, match="no_such_resolver.*have to be loaded with ldm.util.load_config"):
        instantiate_from_config(OmegaConf.load(tmp_path / "own.yaml"))


@pytest.mark.parametrize(
    ("name", "key", "message"),
    [
        ("params.timestep", "timestep", r"does not accept 'timestep'. Did you mean 'timesteps'\? Accepted: "),
        ("params.unet_config.params.modl_channels", "unet_config.params.modl_channels", "mean 'model_channels'"),
        ("params.unet_config.target", "unet_config.target", "has no 'UNetModle'. Did you mean 'UNetModel'"),
        ("params.scheduler_config.params.f_stat", "scheduler_config.params.f_stat", "mean 'f_start'"),
    ],
)
def test_a_slip_in_a_model_is_named_with_its_dotted_key(name: str, key: str, message: str) -> None:
    """Without main.py the message contains the same key, suggestion and accepted arguments."""
    config = copy.deepcopy(MODELS["ldm"])
    OmegaConf.update(node := OmegaConf.create({"params": config["params"]}), f"params.{key}", 1)
    config["params"] = OmegaConf.to_container(node.params)
    if key.endswith("target"):
        config["params"]["unet_config"]["target"] = "ldm.modules.diffusionmodules.openaimodel.UNetModle"
    with pytest.raises(BuildError, match=message) as error:
        model = instantiate_from_config(config)
        model.configure_optimizers()
    assert str(error.value).startswith(f"{name}: ") or "scheduler" in name


def test_targets_in_files_of_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "own_targets.py").write_text(
        "import pytorch_lightning as pl\n\nclass Own(pl.LightningModule):\n    pass\n"
    )
    (tmp_path / "own.yaml").write_text("model: {base_learning_rate: 1.0, target: own_targets.Own}\n")
    code = "from ldm.util import get_obj_from_str; print(get_obj_from_str('own_targets.Own').__name__)"
    for command in (["-P", "-c", code], [str(ROOT / "main.py"), "--base", "own.yaml"]):
        options = {
            "cwd": tmp_path,
            "env": {**os.environ, "PYTHONPATH": str(ROOT)},
            "capture_output": True,
            "text": True,
        }
        done = subprocess.run([sys.executable, *command], **options)
        assert done.returncode == 0 and "Own" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        ("int", 3, ""),
        ("int", np.int64(3), ""),
        ("int", True, ""),
        ("int", 3.5, "expected an integer, got 3.5"),
        ("float", "1e-4", "expected a number, got '1e-4'"),
        ("float", np.float32(3), ""),
        ("float", torch.tensor(0.5), ""),
        ("bool", 1.0, ""),
        ("bool", np.bool_(True), ""),
        ("str | None", Path("a.ckpt"), ""),
        ("str | None", ["a.ckpt"], "expected a text or null, got ['a.ckpt']"),
        ("int | None", None, ""),
        ("int | None", "x", "expected an integer or null, got 'x'"),
        ("int | Sequence[int]", [32, 48], ""),
        ("Sequence[int]", OmegaConf.create([1, 2]), ""),
        ("Sequence[float]", np.zeros(3), ""),
        ("Sequence[str]", "abc", "expected a list, got 'abc'"),
        ("Mapping[str, Any]", OmegaConf.create({}), ""),
        ("Mapping[str, Any] | str", [], "expected a mapping or a text, got []"),
        ("Literal['l1', 'l2']", "l3", "expected l1, l2, got 'l3'"),
        ("Literal['a', 'b'] | None", None, ""),
        ("bool", "yes", "expected true or false, got 'yes'"),
        ("Other | None", 3, ""),
        ("Any", object, ""),
    ],
)
def test_values_and_annotations(annotation, value, expected):
    assert mismatch(annotation, value) == expected


def test_numbers_of_steps_may_be_written_as_powers_of_ten():
    loss = "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"
    for start in (5e4, float("inf")):
        config = OmegaConf.create({"target": loss, "params": {"disc_start": start, "perceptual_weight": 0}})
        assert instantiate_from_config(config).disc_start == start
    params = OmegaConf.create("{warm_up_steps: 1e1, max_decay_steps: 1e5, lr_min: 0, lr_max: 1, lr_start: 1e-6}")
    schedule = {"target": "ldm.lr_scheduler.LambdaWarmUpCosineScheduler", "params": params}
    assert instantiate_from_config(schedule)(10) == 1


def test_annotations_of_other_packages_are_remarks(tmp_path, monkeypatch):
    (tmp_path / "remarks.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Sizes:\n    width: int\n"
        "class Own:\n    def __init__(self, width: int): self.width = width\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("Sizes", "Own"):
        assert instantiate_from_config({"target": f"remarks.{name}", "params": {"width": "wide"}}).width == "wide"


class Fails:
    """A class of own code whose constructor does not take every value."""

    def __init__(self, layers: int = 3) -> None:
        self.layers = [layers / index for index in range(layers)]


def test_errors_of_constructors_are_one_line():
    with pytest.raises(BuildError, match=r"^params: test_util.Fails: ZeroDivisionError: .*\(test_util.py, line \d+\)"):
        instantiate_from_config({"target": "test_util.Fails"})
    with pytest.raises(BuildError, match=r"^params: test_util.Fails: TypeError: .*\(test_util.py, line \d+\)"):
        instantiate_from_config({"target": "test_util.Fails", "params": {"layers": "three"}})
