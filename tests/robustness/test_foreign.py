"""Targets that would run foreign code are neither imported nor called: in the check, with ``-t``, and from Python."""

import copy
import logging
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ldm.config.loading import Config
from ldm.config.targets import find_refused, kind_of_key, refusal
from ldm.data.formats.image_sets import read_array
from ldm.data.rows import npz_blocks
from ldm.diffusion.samplers import named_sampler
from ldm.errors import reason_of
from ldm.evaluation.images.distances import Moments
from ldm.metrics.registry import metric_from_path
from ldm.models.diffusion.methods.noiseclr.pipeline import load_pipeline
from ldm.models.judge import load_judge
from ldm.modules.quantize import VectorQuantizer2
from ldm.modules.weights import read_state_dict
from ldm.runs.checkpoint_io import read_checkpoint
from ldm.scoring.arrays import array_source
from ldm.util import BuildError, ConfigError, UserError, get_obj_from_str, instantiate_from_config, load_config
from main import main

# Modules that are not imported by anything else, so that an import can be seen.
NOT_IMPORTED = ("antigravity", "this", "pip.__main__", "turtle", "idlelib.idle", "test.autotest")
TARGETS = (
    "os.system os.popen os.remove posix.system nt.system shutil.rmtree subprocess.Popen subprocess.run subprocess.call "
    "builtins.exec builtins.eval builtins.open builtins.__import__ pathlib.Path pty.spawn runpy.run_path "
    "importlib.import_module tempfile.TemporaryDirectory tempfile.NamedTemporaryFile logging.FileHandler socket.socket "
    "shelve.DbfilenameShelf mailbox.Maildir io.FileIO zipfile.ZipFile code.InteractiveConsole urllib.request.urlopen "
    "pickle.load webbrowser.open multiprocessing.Process threading.Thread collections.OrderedDict "
    "torch.load torch.save torch.hub.load torch.jit.load torch.classes.load_library torch.ops.load_library "
    "torch.package.PackageImporter torch.utils.cpp_extension.load "
    "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler torch.Generator "
    "numpy.load numpy.fromfile numpy.memmap numpy.save pandas.read_pickle pandas.HDFStore h5py.File joblib.load "
    "open_clip.create_model open_clip.load_openai_model "
    "yaml.unsafe_load omegaconf.OmegaConf.load pip.main pip.__main__.x pip._internal.main setuptools.setup "
    "antigravity.x this.x turtle.Turtle idlelib.idle.x test.autotest.x "
    "ldm.runs.records.write_json ldm.runs.folder.RunFolder ldm.util.atomic_write ldm.util.instantiate_from_config "
    "ldm.util.get_obj_from_str ldm.util.os ldm.util.Interrupted ldm.scoring.run.Options ldm.scoring.engine.Engine "
    "ldm.training.recipe.run_recipe ldm.training.plan.Plan ldm.pictures.draw.save_png ldm.errors.UserError "
    "ldm.data.formats.lmdb_reader.LMDBReader ldm.config.targets.allow main.main setup.setup "
    "foreign_parts.system foreign_parts.Alias foreign_parts.write_sentinel"
).split()
# Compiled, absent, or defined where the source is not followed: refused before they are called, not in the check.
UNREADABLE = (
    "nt.system pip._internal.main torch.Generator torch.classes.load_library torch.ops.load_library torch.jit.load "
    "numpy.load numpy.fromfile numpy.memmap numpy.save pandas.read_pickle pandas.HDFStore h5py.File joblib.load "
    "pip.main pip.__main__.x setuptools.setup omegaconf.OmegaConf.load ldm.util.os main.main setup.setup"
).split()
PLACES = (
    "model data data.params.train data.params.validation data.params.test data.params.predict "
    "data.params.train.params.augment data.params.train.params.augment.0 data.params.train.params.nested.deeply.0.1 "
    "lightning.callbacks.mine lightning.callbacks.image_logger lightning.callbacks.mine.params.inner lightning.logger "
    "lightning.modelcheckpoint lightning.trainer.profiler lightning.trainer.plugins.0 lightning.trainer.strategy "
    "lightning.callbacks.image_logger.params.log_images_kwargs.sampler "
    "lightning.callbacks.image_logger.params.log_config model.params.unet_config model.params.first_stage_config "
    "model.params.first_stage_config.params.lossconfig model.params.cond_stage_config model.params.scheduler_config "
    "model.params.cond_stage_config.text_encoder model.params.anything.at.all model.params.vocabulary_config"
).split()


@pytest.fixture(autouse=True)
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a user's module; dangerous functions leave a sentinel file instead of their effect."""
    sentinel = tmp_path / "sentinel"
    (tmp_path / "foreign_parts.py").write_text(
        "import subprocess\n"
        "from os import system\n"
        "from torch import nn\n"
        "Alias = subprocess.Popen\n"
        f"def write_sentinel(**options): open({str(sentinel)!r}, 'w').close()\n"
        "class Anything:\n    def __init__(self, a=1): self.a = a\n"
        "class Images:\n    def __len__(self): return 1\n    def __getitem__(self, row): return row\n"
        "def build(a: int = 1) -> nn.Module: return nn.Identity()\n"
    )
    monkeypatch.delitem(sys.modules, "foreign_parts", raising=False)
    monkeypatch.delenv("LDM_ALLOW_TARGETS", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = {*tmp_path.iterdir()}
    yield tmp_path
    made = {path.name for path in tmp_path.iterdir() if path not in before}
    assert "sentinel" not in made
    assert not [name for name in NOT_IMPORTED if name in sys.modules]


def control() -> dict:
    """A config that passes the check."""
    folder = {"target": "ldm.data.world.World3D", "params": {"split": "train", "size": 16}}
    unet = {
        "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "params": {"image_size": 16, "in_channels": 3, "out_channels": 3, "model_channels": 32, "num_heads": 2}
        | {"num_res_blocks": 1, "attention_resolutions": [2], "channel_mult": [1, 2]},
    }
    model = {"timesteps": 10, "image_size": 16, "channels": 3, "unet_config": unet}
    return {
        "model": {"base_learning_rate": 1e-4, "target": "ldm.models.diffusion.ddpm.DDPM", "params": model},
        "data": {
            "target": "ldm.data.module.DataModuleFromConfig",
            "params": {"batch_size": 2, "num_workers": 0, "train": folder},
        },
        "lightning": {"trainer": {"max_steps": 1}},
    }


def with_target(place: str, target: str) -> dict:
    """Return the control with a target at a dotted key."""
    content: dict = copy.deepcopy(control())
    node: dict | list = content
    *above, last = [int(key) if key.isdigit() else key for key in place.split(".")]
    for key, following in zip(above, (*above[1:], last)):
        empty: dict | list = [{}, {}] if isinstance(following, int) else {}
        if isinstance(node, dict):
            node = node.setdefault(key, empty)
        else:
            node[key] = node[key] or empty
            node = node[key]
    node[last] = {"target": target, "params": {}}
    return content


def write(content: dict, name: str = "foreign.yaml") -> str:
    Path(name).write_text(yaml.safe_dump(content))
    return name


def test_the_control_is_valid(capsys: pytest.CaptureFixture) -> None:
    assert main(["--base", write(control())]) == 0
    assert capsys.readouterr().out.startswith("OK")


@pytest.mark.parametrize("target", TARGETS)
def test_no_place_accepts_a_foreign_target(target: str) -> None:
    """The check refuses the target everywhere, with the dotted key of its place."""
    for place in PLACES:
        found = dict(find_refused(with_target(place, target)))
        assert list(found) == [f"{place}.target"] or target in UNREADABLE, (place, target, found)
        for message in found.values():
            assert message.startswith("expected a")
            assert f"allow_targets=[{target}]" in message or "Set another" in message


@pytest.mark.parametrize("target", TARGETS)
def test_python_does_not_build_a_foreign_target(target: str) -> None:
    for kind in ("part", "dataset", "model", "callable"):
        with pytest.raises((BuildError, UserError)) as error:
            instantiate_from_config({"target": target, "params": {}}, kind)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("target", ["os.system", "foreign_parts.write_sentinel", "this.x"])
def test_check_and_training_give_the_same_answer(place: str, target: str, capsys: pytest.CaptureFixture) -> None:
    name = write(with_target(place, target))
    answers = []
    for flags in ([], ["-t", "-l", "out"]):
        assert main(["--base", name, *flags]) == 1
        answers.append(capsys.readouterr().err.splitlines()[-1])
    assert answers[0] == answers[1]
    assert answers[0].startswith(f"error: {name}: {place}.target: expected ")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("target", "params"),
    [
        ("os.system", {"command": "touch sentinel"}),
        ("os.mkdir", {"path": "sentinel"}),
        ("subprocess.Popen", {"args": ["touch", "sentinel"]}),
        ("subprocess.check_output", {"args": "touch sentinel", "shell": True}),
        ("shutil.copy", {"src": "foreign.yaml", "dst": "sentinel"}),
        ("logging.FileHandler", {"filename": "sentinel"}),
        ("io.FileIO", {"file": "sentinel", "mode": "w"}),
        ("mailbox.Maildir", {"dirname": "sentinel"}),
        ("numpy.memmap", {"filename": "sentinel", "mode": "w+", "shape": [4]}),
        ("h5py.File", {"name": "sentinel", "mode": "w"}),
        ("torch.utils.tensorboard.SummaryWriter", {"log_dir": "sentinel"}),
        ("ldm.runs.records.write_json", {"path": "sentinel", "content": {}}),
        ("foreign_parts.write_sentinel", {}),
        ("foreign_parts.system", {"command": "touch sentinel"}),
        ("foreign_parts.Alias", {"args": ["touch", "sentinel"]}),
    ],
)
@pytest.mark.parametrize("place", ["data.params.train", "model.params.unet_config", "lightning.callbacks.mine"])
def test_nothing_is_called(target: str, params: dict, place: str) -> None:
    """With arguments that would leave a file, which the fixture looks for."""
    content: dict = with_target(place, target)
    node = content
    for key in place.split("."):
        node = node[key]
    node["params"] = params
    name = write(content)
    for flags in ([], ["-t", "-l", "out"]):
        assert main(["--base", name, *flags]) == 1 or (not flags and target in (*UNREADABLE, params))
    with pytest.raises(BuildError):
        instantiate_from_config(node)


@pytest.mark.parametrize("call", [get_obj_from_str, named_sampler, metric_from_path])
@pytest.mark.parametrize("path", ["antigravity.x", "os.system", "pip.__main__.main", "turtle.Turtle", "setup.setup"])
def test_names_of_samplers_and_metrics(call, path: str, parts: Path) -> None:
    (parts / "setup.py").write_text("raise SystemExit\n")
    with pytest.raises(ConfigError):
        call(path)


def test_a_users_own_classes_are_built() -> None:
    assert instantiate_from_config({"target": "foreign_parts.Anything", "params": {"a": 2}}).a == 2
    assert len(instantiate_from_config({"target": "foreign_parts.Images"}, "dataset")) == 1
    assert type(instantiate_from_config({"target": "foreign_parts.build"}, "module")).__name__ == "Identity"
    with pytest.raises(BuildError, match="expected a data set .*, got foreign_parts.Anything"):
        instantiate_from_config({"target": "foreign_parts.Anything"}, "dataset")


@pytest.mark.parametrize(
    "target",
    "torch.nn.Identity torch.optim.AdamW torch.optim.lr_scheduler.StepLR torchvision.transforms.CenterCrop "
    "torchvision.transforms.v2.RandomAffine pytorch_lightning.callbacks.EarlyStopping torch.utils.data.TensorDataset "
    "lightning.pytorch.callbacks.ModelCheckpoint pytorch_lightning.profilers.SimpleProfiler torchmetrics.MeanMetric "
    "pytorch_lightning.strategies.DDPStrategy taming.models.vqgan.VQModel ldm.diffusion.samplers.DDIMSampler "
    "ldm.evaluation.directions.finders.RandomRows ldm.data.world.world_vocabulary main.ImageLogger "
    "ldm.data.formats.clip_embeddings.with_embeddings ldm.tools.Record".split(),
)
def test_parts_of_models_and_training_are_accepted(target: str) -> None:
    from ldm.legacy import resolve_target

    today = resolve_target(target)
    assert refusal(target, today) == ""
    assert refusal(target, today, imported=get_obj_from_str(target)) == ""


def test_the_command_line_opens_a_config(parts: Path, caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    monkeypatch.setenv("LDM_ALLOW_TARGETS", "")  # restored afterwards
    name = write(with_target("model.params.scheduler_config", "fractions.Fraction"))
    assert main(["--base", name]) == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert main(["--base", name, "allow_targets=[fractions, my_lab.tools]"]) == 0
    assert [record.message for record in caplog.records if "allow_targets" in record.message] == [
        "allow_targets: targets that begin with fractions,my_lab.tools are imported and called"
    ]
    assert instantiate_from_config({"target": "fractions.Fraction", "params": {"numerator": 1}}) == 1
    with pytest.raises(BuildError):
        instantiate_from_config({"target": "fractionsx.Fraction"})


@pytest.mark.parametrize("given", ["[os.system]", "os.system", "[os, subprocess.Popen]"])
def test_a_config_cannot_open_itself(given: str, capsys: pytest.CaptureFixture) -> None:
    content = {**with_target("model", "os.system"), "allow_targets": yaml.safe_load(given)}
    assert main(["--base", write(content)]) == 1
    typed = given if given.startswith("[") else f"[{given}]"
    assert f"add allow_targets={typed.replace(' ', '')} to the command line" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="a config cannot allow its own targets"):
        load_config(write(content))
    stage = {"name": "a", "base": [str(Path(write(control())).absolute())], "overrides": ["allow_targets=[os.system]"]}
    write({"name": "evil", "logdir": "out", "stages": [stage]}, "recipe.yaml")
    assert main(["--recipe", "recipe.yaml"]) == 1
    assert "a config cannot allow its own targets" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import torch\nclass Broken(torch.nn.Module)\n", "broken_part.py, line 2"),
        ("raise RuntimeError('no licence\\nsecond line')\nclass Broken: ...\n", "RuntimeError: no licence"),
        ("from os import no_such_name\nclass Broken: ...\n", "ImportError: cannot import name 'no_such_name'"),
        ("class Broken:\n    x = 1 / 0\n", "ZeroDivisionError: division by zero"),
    ],
)
def test_errors_in_a_users_module_are_one_line(text: str, message: str, parts: Path) -> None:
    (parts / "broken_part.py").write_text(text)
    sys.modules.pop("broken_part", None)
    with pytest.raises((UserError, BuildError), match=message) as error:
        instantiate_from_config({"target": "broken_part.Broken"})
    assert "\n" not in str(error.value) and "broken_part" in str(error.value)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("model", "model"),
        ("data.params.test", "dataset"),
        ("data.params.train.params.augment", "part"),
        ("lightning.callbacks.x", "callback"),
        ("lightning.callbacks.x.params.y", "part"),
        ("model.params.scheduler_config", "callable"),
        ("model.params.first_stage_config.params.lossconfig", "module"),
        ("model.params.log_config", "part"),
    ],
)
def test_kinds_of_keys(key: str, kind: str) -> None:
    assert kind_of_key(key) == kind
    assert Config({}).section("model") == {}


TORCH_ADVICE = (
    "Weights only load failed. In PyTorch 2.6, we changed the default value of the `weights_only` argument in "
    "`torch.load` from `False` to `True`. Re-running `torch.load` with `weights_only` set to `False` will work"
)
NUMPY_ADVICE = (
    "This file contains pickled (object) data. If you trust the file you can load it unsafely using the "
    "`allow_pickle=` keyword argument or `pickle.load()`."
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (TORCH_ADVICE, "Weights only load failed"),
        (NUMPY_ADVICE, "This file contains pickled (object) data"),
        (
            "Object arrays cannot be loaded when allow_pickle=False",
            "it contains Python objects, which are not unpickled",
        ),
        ("bad magic\n number.  Offset 3.", "bad magic number. Offset 3"),
        ("", "it contains Python objects, which are not unpickled"),
    ],
)
def test_reasons_do_not_advise_to_run_code(text: str, reason: str) -> None:
    assert reason_of(ValueError(text)) == reason


class Evil:
    """Unpickling it would leave a file."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch sentinel",)


@pytest.mark.parametrize("kind", ["pickle", "object array", "torch", "torch legacy", "npz"])
@pytest.mark.parametrize("reader", ["checkpoint", "state dict", "judge", "remap", "images", "fid", "scores", "rows"])
def test_pickles_are_not_run(kind: str, reader: str, parts: Path) -> None:
    """Each reader refuses each file in one line that does not advise to run its code."""
    path = parts / f"evil{'.npz' if kind == 'npz' or reader == 'fid' else '.npy'}"
    with path.open("wb") as stream:
        if kind == "pickle":
            pickle.dump({"state_dict": Evil()}, stream)
        elif kind == "object array":
            np.save(stream, np.array([Evil()], dtype=object), allow_pickle=True)
        elif kind == "npz":
            np.savez(stream, mu=np.array([Evil()], dtype=object), images=np.array([Evil()], dtype=object))
        else:
            torch.save({"state_dict": Evil()}, stream, _use_new_zipfile_serialization=kind == "torch")
    readers = {
        "checkpoint": lambda: read_checkpoint(path),
        "state dict": lambda: read_state_dict(path),
        "judge": lambda: load_judge(path),
        "remap": lambda: VectorQuantizer2(4, 2, remap=str(path)),
        "images": lambda: read_array(path),
        "fid": lambda: Moments.read(path),
        "scores": lambda: array_source(path),
        "rows": lambda: list(npz_blocks(path, "images")),
    }
    with pytest.raises(UserError) as error:
        readers[reader]()
    assert not any(word in str(error.value) for word in ("weights_only", "allow_pickle", "pickle.load", "\n"))


@pytest.mark.parametrize(
    "used", [np.zeros((2, 2), int), np.array(["a"]), np.array([None, {}], dtype=object), np.array([1 + 2j])]
)
def test_remap_needs_indices(used: np.ndarray, parts: Path) -> None:
    np.save(parts / "used.npy", used, allow_pickle=True)
    with pytest.raises(UserError, match="remap: .*used.npy") as error:
        VectorQuantizer2(4, 2, remap=str(parts / "used.npy"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("option", ["custom_pipeline", "trust_remote_code"])
def test_code_of_pipelines_is_not_run(option: str) -> None:
    with pytest.raises(ConfigError, match=f"^{option}: code of pipelines is not run"):
        load_pipeline("folder", **{option: "evil"})
