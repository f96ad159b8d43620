"""README and docs: their commands parse, and the files, targets and links in them exist."""

import re
import shlex
import sys
from pathlib import Path

from script_modules import load_script

import run_para_metrics
from ldm.config.loading import find_config_file
from ldm.training.cli import parse_arguments, split_overrides

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))
TEXT = "\n".join(page.read_text() for page in PAGES)


def commands(start):
    """Return the words after ``start`` of every command in a bash block that begins with it."""
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [shlex.split(line.removeprefix(start), comments=True) for line in lines if line.startswith(f"{start} ")]
    assert found, start
    return found


def test_main_commands_parse_and_their_configs_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands("python main.py"):
        for base in parse_arguments(words).base:
            if base.startswith("configs/"):  # others are the reader's own
                assert find_config_file(base).is_file()


def test_scoring_commands_parse(monkeypatch):
    for words in commands("python run_para_metrics.py"):
        monkeypatch.setattr(sys, "argv", ["run_para_metrics.py", *words])
        run_para_metrics.parse_arguments()


def test_sampling_commands_parse():
    script = load_script("sample_diffusion")
    for words in commands("python scripts/sample_diffusion.py"):
        script.read_options(split_overrides(words)[0])


def test_clip_guided_commands_parse():
    for words in commands("python scripts/generate.py"):
        load_script("generate").read_options(words)
    train = load_script("train")
    for words in commands("python scripts/train.py"):
        parse_arguments(["-b", str(train.BASE), "-t", *train.read_options(words)[1]])  # the others are those of main.py
    for words in commands("python scripts/preprocess_clip.py"):
        load_script("preprocess_clip").read_options(words)


def test_scripts_exist():
    scripts = set(re.findall(r"(?:bash|python) ((?:scripts/)?[\w/]+\.(?:sh|py))", TEXT))
    assert {"scripts/quickstart.sh", "scripts/test.sh", "run_para_metrics.py"} <= scripts
    for script in scripts:
        assert (ROOT / script).is_file(), script


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
