"""What README and docs say can be typed: their commands parse, and the files they name exist."""

import re
import shlex
from pathlib import Path

from ldm.config.files import find_config_file
from ldm.training.cli import parse_arguments

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
README = "\n".join(page.read_text() for page in PAGES)


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def test_main_commands_parse_and_their_configs_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = [shlex.split(command)[2:] for command in commands() if command.startswith("python main.py")]
    assert len(found) >= 4
    for words in found:
        for base in parse_arguments(words).base:
            if base.startswith("configs/"):  # others are the reader's own
                assert find_config_file(base).is_file()


def test_scripts_exist():
    scripts = set(re.findall(r"(?:bash|python) ((?:scripts/)?[\w/]+\.(?:sh|py))", README))
    assert {"scripts/quickstart.sh", "scripts/test.sh", "run_para_metrics.py"} <= scripts
    for script in scripts:
        assert (ROOT / script).is_file(), script


def test_targets_exist():
    for target in re.findall(r"`(ldm\.[\w.]+)`", README):
        module, _, name = target.rpartition(".")
        path = ROOT / Path(*module.split("."))
        sources = [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]
        is_module = (path / f"{name}.py").is_file() or (path / name).is_dir()
        assert is_module or any(name in source.read_text() for source in sources), target


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([\w./-]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
