"""The front door: flags, exit codes, messages, and what it does not import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import main as front_door
from ldm.config.loading import find_config_file
from ldm.training.cli import Options, parse_arguments, parse_bool
from ldm.util import ConfigError, UserError

ROOT = Path(front_door.__file__).parent


def options(line: str) -> Options:
    return parse_arguments(line.split())


def test_every_flag_of_the_family() -> None:
    got = options(
        "-b a.yaml b.yaml -t -n run --no-test -p proj -d -s 7 -f _x -l out --scale_lr false -dw 0.5 -dt IM --gpus 0,"
    )
    assert got.base == ("a.yaml", "b.yaml")
    assert (got.train, got.no_test, got.debug) == (True, True, True)
    assert (got.name, got.project, got.seed, got.postfix, got.logdir) == ("run", "proj", 7, "_x", "out")
    assert (got.scale_lr, got.dis_weight, got.dis_loss_type) == (False, 0.5, "IM")
    assert got.trainer == {"gpus": "0,"}


def test_what_is_not_given_stays_unset() -> None:
    got = options("-b a.yaml")
    assert (got.seed, got.scale_lr, got.dis_weight, got.dis_loss_type, got.train) == (None, None, None, None, False)
    assert got.log_root == "logs"
    assert options("-b a.yaml -dw").dis_weight == 1.0


@pytest.mark.parametrize("text", ["yes", "True", "t", "Y", "1"])
def test_yes(text: str) -> None:
    assert parse_bool(text) is True
    assert options(f"-b a.yaml -t {text}").train is True


@pytest.mark.parametrize("text", ["no", "False", "f", "N", "0"])
def test_no(text: str) -> None:
    assert parse_bool(text) is False


def test_overrides_may_stand_anywhere() -> None:
    got = options("model.x=1 --base a.yaml data.params.train.params.size=3 -t model.y=[1,2] -n a=b --max_epochs 3")
    assert got.overrides == ("model.x=1", "data.params.train.params.size=3", "model.y=[1,2]")
    assert got.base == ("a.yaml",)
    assert got.name == "a=b"
    assert got.trainer == {"max_epochs": "3"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("-b a.yaml --max_epoch 3", "'--max_epochs'"),
        ("-b a.yaml --bench_mark", "'--benchmark'"),
        ("-n x -r y", "exclude each other"),
        ("-t", "nothing to do"),
        ("-b a.yaml -t maybe", "'maybe'"),
        ("-b a.yaml -s seven", "seven"),
        ("--recipe r.yaml -b a.yaml", "excludes -b"),
        ("-n x y -b a.yaml", "unrecognized argument 'y'"),
    ],
)
def test_wrong_command_lines(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options(line)


def test_dash_and_underscore_are_the_same_in_a_config_name(tmp_path: Path) -> None:
    (tmp_path / "example_vq_4_16_clip-dis.yaml").write_text("{}")
    found = find_config_file(str(tmp_path / "example-vq_4_16_clip_dis.yaml"))
    assert found.name == "example_vq_4_16_clip-dis.yaml"


def test_a_missing_config_lists_near_names(tmp_path: Path) -> None:
    (tmp_path / "shapes.yaml").write_text("{}")
    with pytest.raises(UserError, match="shapes.yaml"):
        find_config_file(str(tmp_path / "shape.yaml"))


@pytest.mark.parametrize(
    "words", [["--help"], ["--nonsense"], ["-b", "absent.yaml", "-t"], ["-b", "CONFIG"], ["-b", "CONFIG", "-t"]]
)
def test_help_and_config_errors_do_not_wait_for_torch(words: list[str], tmp_path: Path) -> None:
    config = tmp_path / "wrong.yaml"
    config.write_text(
        "model: {target: ldm.models.diffusion.ddpm.DDPM, params: {timestep: 3}}\n"
        "data: {target: main.DataModuleFromConfig, params: {batch_size: 2}}\n"
    )
    words = [str(config) if word == "CONFIG" else word for word in words]
    code = (
        "import sys, main\n"
        "try: status = main.main(sys.argv[1:])\n"
        "except SystemExit as stop: status = stop.code\n"
        "heavy = {'torch', 'pytorch_lightning', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, env=os.environ
    )
    assert "imported" not in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == (0 if words == ["--help"] else 1), done.stderr


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        front_door.main(["--help"])
    assert stop.value.code == 0
    assert "python main.py --recipe" in capsys.readouterr().out


def test_a_message_instead_of_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert front_door.main(["-b", "no/such.yaml"]) == 1
    assert capsys.readouterr().err.startswith("error: config file no/such.yaml does not exist.")
    with pytest.raises(UserError):
        front_door.main(["-b", "no/such.yaml", "-d"])


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(options: Options) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(front_door, "dispatch", stop)
    assert front_door.main(["-b", "a.yaml"]) == 130


MAIN_VAL = (
    "-n run --base a.yaml -t True --no-test false -p proj -d false -s 3 -f _x -l logs --scale_lr False --token_num 10 "
    "--gpus 0, --max_epochs 3 --check_val_every_n_epoch 1 --precision 16 --resume_from_checkpoint last.ckpt"
)


@pytest.mark.parametrize(
    ("words", "token_num", "scale_lr"),
    [("--base a.yaml -t --gpus 0,", None, None), (MAIN_VAL, 10, False), ("-r logs/run -t --token_num -1", None, None)],
)
def test_command_lines_of_main_val_are_accepted(words: str, token_num: int | None, scale_lr: bool | None) -> None:
    got = options(words)
    assert (got.train, got.token_num, got.scale_lr) == (True, token_num, scale_lr)


def test_a_config_without_data_is_valid_but_not_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Configs for inference contain a model only."""
    config = tmp_path / "inference.yaml"
    config.write_text(
        "model:\n"
        "  target: ldm.models.autoencoder.AutoencoderKL\n"
        "  params:\n"
        "    embed_dim: 4\n"
        "    ddconfig: {double_z: true, z_channels: 4, resolution: 32, in_channels: 3, out_ch: 3, ch: 32,\n"
        "               ch_mult: [1, 2], num_res_blocks: 1, attn_resolutions: []}\n"
        "    lossconfig: {target: torch.nn.Identity}\n"
    )
    assert front_door.main(["-b", str(config)]) == 0
    assert "data   none" in capsys.readouterr().out
    assert front_door.main(["-b", str(config), "-t", "-l", str(tmp_path / "logs")]) == 1
    assert "the section `data` is missing" in capsys.readouterr().err
    assert front_door.main(["-b", str(config), "model.params.embed_dims=3"]) == 1
    assert "'embed_dim'" in capsys.readouterr().err
