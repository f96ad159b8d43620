"""Building objects from configs, old names included; files that are whole or untouched."""

from __future__ import annotations

from pathlib import Path

import pytest

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
)


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


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("fractions.Fractoin", "'Fraction'"),
        ("fraction.Fraction", "no module 'fraction'"),
        ("Fraction", "no dotted path"),
        ("ldm.nothing.Here", "no module 'ldm.nothing'"),
    ],
)
def test_wrong_targets(target: str, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        get_obj_from_str(target)


def test_a_module_that_needs_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("import a_package_nobody_has\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="needs the package 'a_package_nobody_has'"):
        get_obj_from_str("needs_more.Thing")


def test_wrong_arguments_list_the_right_ones() -> None:
    with pytest.raises(BuildError, match=r"'numerater'.*Did you mean 'numerator'.*Accepted: numerator, denominator"):
        instantiate_from_config({"target": "fractions.Fraction", "params": {"numerater": 1}})


def test_an_error_inside_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "breaks.py").write_text("def build(x=1):\n    raise TypeError('inside')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(TypeError, match="^inside$"):
        instantiate_from_config({"target": "breaks.build"})


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
