"""Reading what a class accepts from its source."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ldm.config.signatures import UnknownNameError, find_misfit, read_signature

SOURCE = """
from dataclasses import dataclass
import other_package

@dataclass
class Sizes:
    width: int
    depth: int = 2

class Base:
    def __init__(self, a, b=1, *, c): ...

class Named(Base):
    def __init__(self, d, **kwargs):
        super().__init__(c=3, **kwargs)

class Same(Base):
    pass

class Empty:
    pass

class Mapping(dict):
    pass

class Open:
    def __init__(self, a, **others): ...

class Foreign(other_package.Thing):
    def __init__(self, d, **kwargs): ...

class Described(Base):
    def __init__(self, extra=0, **params):
        self.sizes = Sizes.from_params(params)

def build(x, y=2): ...
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "signature_cases").mkdir()
    (tmp_path / "signature_cases" / "__init__.py").write_text("from .inner import Named as Renamed\n")
    (tmp_path / "signature_cases" / "inner.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "required", "is_open"),
    [
        ("inner.Base", {"a": True, "b": False, "c": True}, False),
        ("inner.Named", {"a": True, "b": False, "d": True}, False),
        ("Renamed", {"a": True, "b": False, "d": True}, False),
        ("inner.Same", {"a": True, "b": False, "c": True}, False),
        ("inner.Empty", {}, False),
        ("inner.Mapping", {}, True),
        ("inner.Open", {"a": True}, True),
        ("inner.Foreign", {"d": True}, True),
        ("inner.Described", {"width": True, "depth": False, "extra": False}, False),
        ("inner.Sizes", {"width": True, "depth": False}, False),
        ("inner.build", {"x": True, "y": False}, False),
    ],
)
def test_arguments(package: None, name: str, required: dict[str, bool], is_open: bool) -> None:
    signature = read_signature(f"signature_cases.{name}")
    assert signature is not None
    assert (signature.required, signature.is_open) == (required, is_open)
    assert "signature_cases" not in sys.modules


@pytest.mark.parametrize("name", ["no_such_package.X", "signature_cases.inner.Absent", "math.sqrt"])
def test_what_the_source_does_not_tell(package: None, name: str) -> None:
    assert read_signature(name) is None


def test_our_own_names_must_exist() -> None:
    with pytest.raises(UnknownNameError, match="module ldm.errors has no Nothing"):
        read_signature("ldm.errors.Nothing")


METHODS = "ldm.models.diffusion.methods"


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (f"{METHODS}.disdiff.model.DisDiff", "dis_batch_size"),
        (f"{METHODS}.clip_disdiff.model.CLIPDisDiff", "dis_batch_size"),
        ("ldm.evaluation.editing.callback.EditScore", "num_guidance_samples"),
        ("ldm.evaluation.directions.callback.DirectionBench", "batch_size"),
        ("ldm.evaluation.directions.callback.DirectionBench", "num_directions"),
        ("ldm.evaluation.train_scores.ScoreWhileTraining", "every_n_train_steps"),
    ],
)
def test_numbers_of_things_are_positive(target: str, name: str) -> None:
    for value in (0, -1, 1.5, True, "one"):
        misfit = find_misfit(target, {name: value}, read_signature(target), check_required=False)
        assert misfit is not None and misfit.name == name and "expected an integer" in misfit.message
    assert find_misfit(target, {name: 3}, read_signature(target), check_required=False) is None
