"""Names of runs, recipes and stages stay in their folder."""

from pathlib import Path

import pytest
from test_foreign import control, write

from main import main


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "name", ["a/b", "../up", "..", ".hidden", "-dash", "a\\b", "a\nb", "a\x00b", "a\x1b[31m", "/etc/x"]
)
def test_names_that_leave_their_folder(name: str, capsys: pytest.CaptureFixture) -> None:
    """Names of runs, recipes and stages; a suffix may begin with a dot or a dash, as in "-s1"."""
    config = write(control())
    flags = [f"--name={name}"] + ([f"--postfix={name}"] if name not in (".hidden", "-dash") else [])
    for flag in flags:
        assert main(["--base", config, flag]) == 1
        assert capsys.readouterr().err.startswith(
            f"error: command line: -{flag[2]}" if flag[2] == "n" else "error: command"
        )
    stage = {"name": "a", "base": [str(Path(config).absolute())]}
    for content in ({"name": name, "stages": [stage]}, {"name": "a", "stages": [{**stage, "name": name}]}):
        assert main(["--recipe", write({"logdir": "out", **content}, "recipe.yaml")]) == 1
        assert "name: expected a name without" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["two words", "Größe", "a$b", "[x]", "实验", "a.b-c_1", "x=1", "🦊", "a..b"])
def test_names_that_are_kept(name: str) -> None:
    assert main(["--base", write(control()), f"--name={name}", f"--postfix=-{name}"]) == 0
