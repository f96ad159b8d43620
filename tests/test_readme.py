"""README and docs: the targets and links in them exist. Their commands are run by test_docs_commands.py."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))
TEXT = "\n".join(page.read_text() for page in PAGES)


def test_targets_exist():
    for target in re.findall(r"`(ldm\.[\w.]+)`", TEXT):
        module, _, name = target.rpartition(".")
        path = ROOT / Path(*module.split("."))
        sources = [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]
        is_module = (path / f"{name}.py").is_file() or (path / name).is_dir()
        assert is_module or any(name in source.read_text() for source in sources), target


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:)([\w./-]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_no_page_has_placeholders():
    pattern = r"\b(?:TABLE|TIME|REAL)_[A-Z]+\b|\bGENERATE\b"
    found = {page.name: words for page in PAGES if (words := re.findall(pattern, page.read_text()))}
    assert not found
