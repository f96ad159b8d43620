"""The run's folder and how it is found again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ldm.config.loading import load_config
from ldm.runs import records
from ldm.runs.find import find_run, resolve_resume
from ldm.runs.folder import last_checkpoint, new_run_folder
from ldm.runs.records import collect_versions, update_results, update_run
from ldm.util import UserError


def test_two_runs_of_one_second_do_not_share_a_folder(tmp_path: Path) -> None:
    first = new_run_folder(tmp_path, "x", "2026-01-01T00-00-00")
    second = new_run_folder(tmp_path, "x", "2026-01-01T00-00-00")
    assert first.path.name == "2026-01-01T00-00-00_x"
    assert second.path.name == "2026-01-01T00-00-00_x-2"


def test_a_logdir_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="-l"):
        new_run_folder(tmp_path / "file" / "logs", "x", "now")


def test_records_merge(tmp_path: Path) -> None:
    update_results(tmp_path, psnr=20.0)
    assert update_results(tmp_path, factor_vae=0.9) == {"psnr": 20.0, "factor_vae": 0.9}
    assert json.loads((tmp_path / "results.json").read_text()) == {"psnr": 20.0, "factor_vae": 0.9}
    update_run(tmp_path, status="running")
    assert json.loads((tmp_path / "run.json").read_text()) == {"status": "running"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "run.json"]


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"psnr": ')
    with pytest.raises(UserError, match="results.json cannot be read"):
        update_results(tmp_path, psnr=1.0)


def test_a_full_disk_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update_results(tmp_path, psnr=20.0)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records.json, "dump", fail)
    with pytest.raises(OSError, match="No space"):
        update_results(tmp_path, psnr=1.0)
    assert json.loads((tmp_path / "results.json").read_text()) == {"psnr": 20.0}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_find_run_lists_what_there_is(tmp_path: Path) -> None:
    update_run(tmp_path / "1_a", name="a", status="finished", started="1")
    update_run(tmp_path / "deep" / "2_a", name="a", status="finished", started="2")
    update_run(tmp_path / "3_a", name="a", status="failed", started="3")
    assert find_run("a", [tmp_path]) == tmp_path / "deep" / "2_a"
    with pytest.raises(UserError, match=r"(?s)no finished run named 'b'.*3_a \(a, failed\)"):
        find_run("b", [tmp_path])


def test_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint"):
        last_checkpoint(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "epoch=000001.ckpt").write_bytes(b"")
    assert last_checkpoint(tmp_path).name == "epoch=000001.ckpt"
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"")
    assert last_checkpoint(tmp_path).name == "last.ckpt"


def test_resume_from_a_folder_or_a_file(tmp_path: Path) -> None:
    run = tmp_path / "now_x"
    for file in ("configs/1-lightning.yaml", "configs/1-project.yaml", "checkpoints/last.ckpt", "checkpoints/a.ckpt"):
        (run / file).parent.mkdir(parents=True, exist_ok=True)
        (run / file).write_text("model: {}\n")
    update_run(run, name="x", seed=5)
    resume = resolve_resume(run)
    assert resume.checkpoint == run / "checkpoints" / "last.ckpt"
    assert [path.name for path in resume.configs] == ["1-lightning.yaml", "1-project.yaml"]
    assert resume.record["seed"] == 5
    from_file = resolve_resume(run / "checkpoints" / "a.ckpt")
    assert from_file.checkpoint.name == "a.ckpt"
    assert from_file.folder.path == run


def test_resume_from_what_is_no_run(tmp_path: Path) -> None:
    update_run(tmp_path / "now_x", name="x")
    with pytest.raises(UserError, match="does not exist. Runs found there: .*now_x"):
        resolve_resume(tmp_path / "now_y")
    with pytest.raises(UserError, match="got a path without .*configs/"):
        resolve_resume(tmp_path / "now_x")
    (tmp_path / "now_x" / "configs").mkdir()
    (tmp_path / "now_x" / "configs" / "a.yaml").write_text("")
    with pytest.raises(UserError, match="without -r"):
        resolve_resume(tmp_path / "now_x")


def test_versions_name_the_packages() -> None:
    assert set(collect_versions()) == {"python", "torch", "lightning", "numpy", "open_clip"}


def test_the_hint_how_to_train_a_missing_run_is_the_command_in_the_head_of_its_config(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(UserError, match="configs/quickstart/world.yaml configs/quickstart/clip.yaml -t -n clip -l"):
        find_run("clip", [str(tmp_path)])
    with pytest.raises(UserError, match="--base CONFIG.yaml -t -n nothing"):
        find_run("nothing", [str(tmp_path)])


@pytest.mark.parametrize("is_beside", [True, False])
def test_the_hint_is_complete_in_another_folder(tmp_path, monkeypatch, is_beside):
    """Configs are searched beside the files at hand, else beside the package; -n cannot contain a slash."""
    root = tmp_path / "copy" if is_beside else Path(__file__).parents[2]
    if is_beside:
        (root / "configs" / "folder").mkdir(parents=True)
        (root / "configs" / "folder" / "stage-1.yaml").write_text(
            "# python main.py --base configs/folder/stage-1.yaml -t"
        )
    name = "folder/stage-1" if is_beside else "latent-diffusion/shapes3d-vq-4-16"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"main.py --base {root}/configs/{name}.yaml -t ") as error:
        find_run(name, ["logs"], [str(root / "configs" / "mine.yaml")])
    assert " -n " not in str(error.value) and "CONFIG.yaml" not in str(error.value)
    with pytest.raises(UserError, match="python main.py --base other/none.yaml -t -l logs"):
        find_run("other/none", ["logs"])


def test_the_hint_names_the_data_at_hand(tmp_path, monkeypatch):
    """Own data take the place of the world, and configs beside those at hand are preferred."""
    monkeypatch.chdir(Path(__file__).parents[2])
    (tmp_path / "mine.yaml").write_text("data: {params: {train: {target: stand_ins.World64}}}")
    mine = str(tmp_path / "mine.yaml")
    for folder, stages in {
        "quickstart": "configs/quickstart/latents.yaml configs/quickstart/ldm.yaml",
        "own_data": "configs/own_data/first_stage_vq.yaml configs/own_data/ldm.yaml",
    }.items():
        (tmp_path / folder).mkdir()
        stage = tmp_path / folder / "stage.yaml"
        stage.write_text("model: {params: {ckpt_path: '${last_ckpt:ldm}'}}")
        with pytest.raises(UserError, match=f"--base {mine} {stages} -t -n ldm -l {tmp_path}"):
            load_config([mine, stage], roots=[tmp_path])
    with pytest.raises(UserError, match=f"--base {mine} CONFIG.yaml -t -n nothing"):
        load_config([mine], ["model.x=${last_run:nothing}"], roots=[tmp_path])
