"""scripts/bench_directions.py: the loss of both ways is equal, and errors are messages."""

import re

import pytest
from direction_models import save_text_model
from script_modules import load_script


def test_noiseclr_loss_equals_that_of_a_pass_per_direction(tmp_path, capsys):
    zoo = save_text_model(tmp_path / "zoo")
    words = ["-r", str(zoo), "-K", "4", "-M", "2", "-B", "2", "-n", "1", "--device", "cpu"]
    assert load_script("bench_directions").main(words) == 0
    shown = capsys.readouterr().out
    reference, ours = (float(loss) for loss in re.findall(r"last loss (\S+)", shown))
    assert ours == pytest.approx(reference, abs=2e-5) and "times as fast" in shown


def test_noiseclr_bench_of_a_missing_run(tmp_path, capsys):
    assert load_script("bench_directions").main(["-r", str(tmp_path / "nowhere")]) == 1
    assert "does not exist" in capsys.readouterr().err
