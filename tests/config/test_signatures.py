"""Reading what a class accepts from its source."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ldm.config.signatures import UnknownNameError, read_signature

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
