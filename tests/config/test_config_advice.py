"""Advice in messages about targets, references and files that belong to another flag."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm.config.loading import load_config
from ldm.config.validation import validate
from ldm.training.cli import parse_arguments
from ldm.util import ConfigError, UserError, get_obj_from_str

ROOT = Path(__file__).resolve().parents[2]
VQ = [str(ROOT / "configs/quickstart" / name) for name in ("world.yaml", "vq.yaml")]
LAMBDA = "ldm.lr_scheduler.LambdaLinearScheduler"


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "advicebits.py").write_text("class Here:\n    pass\n\n\ndef make():\n    return 3\n")
    return tmp_path


@pytest.mark.parametrize(
    ("target", "advice"),
    [
        ("pytorch_lightning.callbacks.EarlyStoping", "Did you mean 'EarlyStopping'[?]$"),
        ("torch.optim.lr_scheduler.StepLRs", "Did you mean 'StepLR'[?]$"),
        (
            "advicebits.Missing",
            "has no .?Missing.?. It has Here. Correct the name, or add the class to .*advicebits.py$",
        ),
        ("advicebits.Her", "Did you mean 'Here'[?]$"),
    ],
)
def test_names_beside_a_missing_class_are_shown(target: str, advice: str) -> None:
    with pytest.raises(ConfigError, match=advice) as error:
        validate(load_config(VQ, [f"lightning.callbacks.mine.target={target}"]))
    assert "fork" not in str(error.value)
    with pytest.raises(ConfigError, match=advice):
        get_obj_from_str(target)


def test_plain_functions_are_told_to_be_annotated() -> None:
    with pytest.raises(ConfigError, match="got advicebits.make, a function. Name a class, or annotate the function"):
        validate(load_config(VQ, ["lightning.callbacks.mine.target=advicebits.make"]))


@pytest.mark.parametrize("name", ["StepLR", "CosineAnnealingLR", "LambdaLR"])
def test_schedulers_of_torch_are_refused_with_one_of_ours(name: str) -> None:
    scheduler = f"model.params.scheduler_config={{target: torch.optim.lr_scheduler.{name}, params: {{step_size: 2}}}}"
    with pytest.raises(ConfigError, match=f"map a step to a factor, such as {LAMBDA}, got torch.*{name}") as error:
        validate(load_config(VQ, [scheduler]))
    assert "allow_targets" not in str(error.value)


def test_data_properties_without_data_name_the_missing_section() -> None:
    with pytest.raises(ConfigError, match="expected a `data` section .* configs/quickstart/world.yaml, with -b"):
        load_config([ROOT / "configs/quickstart/clip.yaml"])


FILES = {
    "config": ("model: {target: a.B}\nlightning: {}\n", "--base FILE"),
    "recipe": ("name: x\nstages: [{name: a, base: [b.yaml]}]\ndata: null\n", "--recipe FILE"),
    "file of own data": ("path: photos\nstages: {a: {}}\n", "--recipe configs/own_data/recipe.yaml data=FILE"),
}


@pytest.mark.parametrize("expected", FILES)
@pytest.mark.parametrize("found", FILES)
def test_files_of_another_flag(own_folder: Path, found: str, expected: str) -> None:
    file = own_folder / "file.yaml"
    file.write_text(FILES[found][0])
    if found == expected:
        load_config([file], kind=expected)
        return
    with pytest.raises(ConfigError) as error:
        load_config([file], kind=expected)
    command = FILES[found][1].replace("FILE", str(file))
    assert str(error.value) == f"{file}: expected a {expected}, got a {found}. Run: python main.py {command}"


def test_folders_are_not_called_missing(own_folder: Path) -> None:
    (own_folder / "photos").mkdir()
    with pytest.raises(UserError, match="photos: expected a .yaml file, got a folder. .* contains path: .*photos"):
        load_config([own_folder / "photos"])
    (own_folder / "photos" / "a.yaml").write_text("{}")
    with pytest.raises(UserError, match="got a folder. Name one in it: .*photos/a.yaml"):
        load_config([own_folder / "photos"])


@pytest.mark.parametrize(
    ("words", "got"),
    [
        ("a.b = 3", "got 'a.b'"),
        ("a.b =3", "got 'a.b'"),
        ("a.b= 3", "got '3'"),
        ("a.b= 1e-4", "got '1e-4'"),
        ("-t a.b = 3", "got 'a.b'"),
        ("a.b", "got 'a.b'"),
    ],
)
def test_overrides_with_spaces(words: str, got: str) -> None:
    with pytest.raises(ConfigError, match=f"key=value without spaces, {got}"):
        parse_arguments(["--base", "x.yaml", *words.split()])


@pytest.mark.parametrize("words", ["a.b= -t", "a.b= c.d=1", "a.b= y.yaml", "y.yml", "-n x=", "-n a.b= -t"])
def test_other_words_are_no_overrides_with_spaces(words: str) -> None:
    assert parse_arguments(["--base", "x.yaml", *words.split()]).base[0] == "x.yaml"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("${unclosed", r"expected \$\{a.b\}, or .* for plain text, got '\$\{unclosed'"),
        ("${a ${b c}", "for plain text, got "),
        ("${model.nope}", "model.x: .*: this config has no key model.nope. Correct the reference or add the key"),
        ("${oc.env:NOPE_}", "model.x: the variable NOPE_ is not set. Export it, or use .*env:NOPE_,default"),
        ("${foo:1}", "model.x: expected .*env:, .*last_ckpt:, got .*foo:"),
    ],
)
def test_references_in_plain_words(own_folder: Path, value: str, message: str) -> None:
    (own_folder / "file.yaml").write_text(f"model: {{x: '{value}'}}")
    for files, words in ((["file.yaml"], []), ([], [f"model.x={value}"])):
        with pytest.raises(ConfigError, match=message) as error:
            load_config(files, words)
        assert "\n" not in str(error.value)
