"""The direction bench: a denoiser with known directions, selection and report, verdicts, and the files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from bench_models import FACTORS, VOCABULARY, Toy, judge
from torch.utils.data import DataLoader

from ldm.data.world import World3D
from ldm.diffusion.samplers import DDIMSampler
from ldm.evaluation.directions.callback import DirectionBench
from ldm.evaluation.directions.measure import Bench, BenchPlan, Measured, Meters, margins, mean_similarity
from ldm.evaluation.directions.report import BenchReport
from ldm.models.diffusion.methods.noiseclr.directions import DirectionSet
from ldm.models.diffusion.methods.noiseclr.model import NoiseCLR
from ldm.models.judge import AttributeJudge
from ldm.util import ConfigError, UserError

FULL = Meters(VOCABULARY, judge)


def plan_of(num_samples=16, **options):
    options = {"strengths": (-3.0, 1.0, 3.0), "batch_size": 10, "seed": 1} | options
    return BenchPlan(num_samples, DDIMSampler(4), **options)


def rows_of(denoiser, values, finder="noiseclr"):
    return DirectionSet.of(denoiser, torch.tensor(values), denoiser.row_space, finder)


def measured_of(selection, matrix, largest=None, finder="x"):
    count = len(matrix)
    directions = DirectionSet(torch.zeros(count, 1), "condition", tuple(f"<t{k}>" for k in range(count)), finder)
    ones = np.ones(count)
    return Measured(
        directions=directions,
        strengths=ones,
        selection=np.array(selection),
        matrix=np.array(matrix),
        effects=ones,
        largest_effects=ones if largest is None else np.array(largest),
        ssim=ones,
        lpips=ones * np.nan,
        similarity=np.eye(count),
    )


def test_directions_own_the_regions_that_they_paint():
    denoiser = Toy()
    values = [[4.0, 0, 0, 0], [0, 0, 4.0, 0], [2.0, 2.0, 2.0, 2.0], [0, 0, 0, 0], [0, 0, 4.0, 4.0]]
    bench = Bench(denoiser, plan_of(), FULL)
    found = bench.measure(rows_of(denoiser, values))
    plan = bench.plan
    assert found.matrix.shape == (5, FACTORS) and found.best(plan).keys() == {0, 2}
    assert found.best(plan) == {0: 0, 2: 1}
    assert found.owns(plan)[:4].tolist() == [True, True, False, False]
    off = found.matrix[[0, 1]][:, [1, 3]]
    assert (off == 0).all() and found.own[1][0] == 0 and found.own[0][0] >= 0.5
    assert found.effects[3] == 0 and found.largest_effects[3] == 0 and found.ssim[3] == pytest.approx(1)
    assert (found.effects[:3] > 0.05).all()


def test_numbers_do_not_depend_on_the_batch_and_equal_edits_one_by_one():
    denoiser = Toy()
    directions = rows_of(denoiser, [[4.0, 0, 0, 0], [0, 1.0, 4.0, 0]])
    first, second = (Bench(denoiser, plan_of(batch_size=size), FULL).measure(directions) for size in (7, 1000))
    assert np.array_equal(first.matrix, second.matrix) and np.allclose(first.effects, second.effects, atol=1e-5)
    bench = Bench(denoiser, plan_of(), FULL)
    edit = [type("Edit", (), {"direction": 1, "strength": 3.0, "start": 0, "end": None})()]
    sampler, x_T = bench.plan.sampler, bench.noise[5:6]
    expected = denoiser.decode(
        sampler.sample(directions.edited(denoiser, edit, sampler, 1), x_T, denoiser.schedule)
    ).clamp(-1, 1)
    assert torch.allclose(bench.images(directions, 1, 3.0, np.array([5])), expected, atol=1e-5)


def test_shifts_of_the_bottleneck_are_measured_in_one_batch():
    denoiser = Toy()
    shifts = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)) * 3
    directions = DirectionSet.of(denoiser, shifts, "bottleneck", "h_space")
    bench = Bench(denoiser, plan_of(), FULL)
    before = denoiser.num_samples
    bench.images(directions, 0, 1.0, np.arange(16))
    assert denoiser.num_samples - before == 16 * len(bench.plan.sampler.timesteps(20))  # one pass per sample and step
    assert (bench.measure(directions).effects > 0).all()


def test_the_two_best_strengths_of_the_first_quarter_are_compared_on_the_first_half():
    denoiser = Toy()
    bench, seen = Bench(denoiser, plan_of(16, strengths=(-3.0, -1.0, 1.0, 3.0)), FULL), []
    observe = bench._observe
    bench._observe = lambda directions, kept, grid, samples, measures: (
        seen.append((kept.shape, samples.tolist())) or observe(directions, kept, grid, samples, measures)
    )
    bench.measure(rows_of(denoiser, [[4.0, 0, 0, 0]] * 2))
    quarters = [list(range(4)), list(range(4, 8)), list(range(8, 16))]
    assert seen == [((2, 4), quarters[0]), ((2, 2), quarters[1]), ((2, 1), quarters[2])]


def test_factor_and_best_direction_are_chosen_on_the_first_half_alone():
    selection = [[0.9, 0.1, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.6]]
    matrix = [[0.7, 0.1, 0.1], [0.6, 0.2, 0.0], [0.0, 0.9, 0.4]]
    found, plan = measured_of(selection, matrix), plan_of()
    assert found.owners.tolist() == [0, 0, 2] and found.owns(plan).tolist() == [True, True, False]
    assert found.best(plan) == {0: 1}  # the margin of direction 0 is larger on the other half only
    assert found.own[1].tolist() == pytest.approx([0.1, 0.1, 0.45])
    assert found.best_margins().tolist() == pytest.approx([0.5, 0.7, -0.05])
    report = BenchReport(plan, ("a", "b", "c"), {"x": found}, {"x": {"seconds": 1.0, "peak_memory_bytes": 2}})
    assert report.figures() == {
        "x_owned_factors": 1,
        "x_leakage": 0.1,
        "x_mean_margin": pytest.approx((0.6 + 0.5 - 0.05) / 3, abs=1e-6),
        "owned_factors": {"x": 1},
        "leakage": {"x": 0.1},
    }


def test_weakest_strength_of_equal_margins_and_thresholds():
    denoiser = Toy()
    found = Bench(denoiser, plan_of(strengths=(-8.0, 30.0, 8.0)), FULL).measure(rows_of(denoiser, [[9.0, 0, 0, 0]]))
    assert abs(found.strengths[0]) == 8.0
    matrix = [[0.5, 0.29, 0.29], [0.49, 0.0, 0.0], [0.9, 0.3, 0.3]]
    assert measured_of(matrix, matrix).owns(plan_of()).tolist() == [True, False, False]
    loose = plan_of(own_threshold=0.4, leakage_threshold=0.5)
    assert measured_of(matrix, matrix).owns(loose).all()


def test_no_effect_is_below_the_quantile_of_the_control():
    control = measured_of(np.eye(2), np.eye(2), largest=[0.2, 0.4], finder="random")
    found = measured_of(np.eye(3)[:, :2], np.eye(3)[:, :2], largest=[0.1, 0.205, 0.3])
    costs = dict.fromkeys(("x", "control"), {"seconds": None, "peak_memory_bytes": None})
    report = BenchReport(plan_of(), ("a", "b"), {"x": found, "control": control}, costs)
    content = report.to_dict()
    assert content["no_effect_threshold"] == pytest.approx(0.21)
    assert [each["has_effect"] for each in content["finders"]["x"]["directions"]] == [False, False, True]
    assert content["finders"]["x"]["without_effect"] == 2
    assert content["finders"]["x"]["ahead_of_random"] == {"owned_factors": 0, "mean_margin": 0.0}
    alone = BenchReport(plan_of(), ("a", "b"), {"x": found}, costs).to_dict()
    assert alone["no_effect_threshold"] is None and alone["finders"]["x"]["ahead_of_random"] is None
    assert alone["finders"]["x"]["directions"][0]["has_effect"] is None
    json.dumps(content, allow_nan=False)


def test_without_a_judge_effects_and_similarity_remain():
    denoiser = Toy()
    bench = Bench(denoiser, plan_of(), Meters())
    values = [[4.0, 0, 0, 0], [2.0, 0, 0, 0], [0, 4.0, 0, 0], [0.0, 0, 0, 0]]
    found = bench.measure(rows_of(denoiser, values))
    assert found.matrix.shape == (4, 0) and (np.abs(found.strengths) == 3).all() and found.best(bench.plan) == {}
    assert found.similarity[0, 1] > 0.95 and found.similarity[0, 2] < 0.5 and np.isnan(found.similarity[3, 3])
    report = BenchReport(bench.plan, (), {"x": found}, {"x": {"seconds": 0.1, "peak_memory_bytes": 1}})
    assert report.figures()["x_owned_factors"] is None and report.figures()["leakage"] == {"x": None}
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert content["finders"]["x"]["matrix"] is None and content["finders"]["x"]["similarity"][3][3] is None


def test_margins_and_similarity():
    assert margins(np.array([[0.9, 0.3, 0.1]])).tolist() == [pytest.approx([0.7, -0.2, -0.5])]
    assert margins(np.array([[0.9]])).tolist() == [[0.9]]
    changes = np.array([[[1.0, 0], [0, 2.0]], [[-3.0, 0], [1.0, 0]]])  # parallel in one image, orthogonal in the other
    assert np.allclose(mean_similarity(changes), [[1, 0.5], [0.5, 1]])


def test_settings_out_of_range_and_diverged_images():
    for options in ({"strengths": ()}, {"strengths": (0.0, 1.0)}, {"strengths": (float("nan"),)}):
        with pytest.raises(ConfigError, match="direction bench: expected"):
            plan_of(**options)
    for wrong, message in (
        ({"strengths": [0]}, "finite and not 0"),
        ({"num_samples": 3}, "num_samples: expected an integer of at least 4, got 3"),
        ({"num_samples": -1}, "num_samples: expected an integer of at least 4, got -1"),
        ({"finders": ["pca"]}, "finders: expected noiseclr"),
        ({"finders": []}, "finders: .*got none"),
    ):
        with pytest.raises(ConfigError, match=message):  # when the config is checked
            DirectionBench(**wrong)

    class Diverged(Toy):
        def decode(self, z):
            return super().decode(z) * float("nan")

    with pytest.raises(UserError, match="direction bench, base images: expected finite images"):
        Bench(Diverged(), plan_of(), FULL)


def test_clip_names_the_attribute_that_its_reading_changes_most():
    def read(images):
        bright = judge(images).float()
        return [torch.stack([1 - part, part], dim=1) for part in bright.T]

    bench = Bench(Toy(), plan_of(), Meters(VOCABULARY, judge, read))
    found = bench.measure(rows_of(bench.denoiser, [[0, 4.0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 4.0]]))
    assert [name.name for name in found.names] == ["region_1", "", "region_3"]
    assert found.names[0].confidence == 1.0 and set(found.names[2].words) <= {"low", "high"}
    costs, names = {"x": {"seconds": 0, "peak_memory_bytes": 0}}, VOCABULARY.factor_names
    for factors in (names, ()):  # with a judge, and without one
        report = BenchReport(bench.plan, factors, {"x": found}, costs, names)
        named = report.to_dict()["finders"]["x"]["directions"][0]["clip"]
        assert named["name"] == "region_1" and list(named["effects"]) == list(names)


class TextToy(Toy):
    """Images of 32 pixels of a model that takes texts."""

    def __init__(self):
        super().__init__(takes_texts=True)

    def decode(self, z):
        return super().decode(z).repeat_interleave(2, 2).repeat_interleave(2, 3)


def run_bench(tmp_path, dataset=None, target="test_noiseclr_bench.TextToy", rows=None, **options):
    params = {"space": "shapes3d", "channels": 4, "hidden": 8} | options.pop("judge_params", {})
    network = AttributeJudge(**params)
    torch.save({"hyper_parameters": dict(network.hparams), "state_dict": network.state_dict()}, tmp_path / "judge.ckpt")
    sampler = {"target": "ldm.diffusion.samplers.DDIMSampler", "params": {"num_steps": 3}}
    small = {"num_samples": 8, "strengths": (-2.0, 2.0), "num_images": 12, "sampler": sampler, "columns": 3}
    callback = DirectionBench(**{"judge": str(tmp_path / "judge.ckpt"), **small, **options})
    model = NoiseCLR({"target": target}, num_directions=4, directions_per_iteration=2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(**quiet, callbacks=[callback], default_root_dir=tmp_path / "run", max_steps=2)
    loader = DataLoader(dataset or World3D(limit=20), batch_size=5, collate_fn=lambda batch: batch)
    trainer.fit(model, loader)
    if rows is not None:
        model.rows.data = rows
    trainer.test(model, loader, verbose=False)
    return tmp_path / "run"


def test_callback_trains_two_steps_and_leaves_files(tmp_path, capsys):
    run = run_bench(tmp_path)
    results = json.loads((run / "results.json").read_text())
    names = ["noiseclr", "h_space", "jacobian", "random"]
    flat = [f"{name}_{key}" for name in names for key in ("owned_factors", "leakage", "mean_margin")]
    assert sorted(results) == sorted([*flat, "owned_factors", "leakage"]) and list(results["owned_factors"]) == names
    text = (run / "direction_bench" / "2.json").read_text()
    report = json.loads(text)
    assert "NaN" not in text and "Infinity" not in text and report["step"] == 2
    assert report["lpips"].startswith(("not computed: ", "AlexNet")) and report["sampler"]["num_steps"] == 3
    for name in names:
        found = report["finders"][name]
        assert np.array(found["matrix"]).shape == (4, 6) and len(found["directions"]) == 4
        assert np.array(found["similarity"]).shape == (4, 4) and found["seconds"] is not None
        assert found["owned_factors"] == results[f"{name}_owned_factors"]
        assert (run / "direction_bench" / f"2_{name}.png").is_file()
        assert (run / "images" / "test" / f"directions_{name}_gs-000002_e-000000_b-000000.png").is_file()
    assert (
        report["finders"]["noiseclr"]["kind"] == "condition" and report["finders"]["jacobian"]["kind"] == "bottleneck"
    )
    assert (run / "direction_bench" / "2_overview.png").is_file()
    assert "noiseclr: " in capsys.readouterr().out


def test_callback_without_a_judge_and_with_named_finders(tmp_path):
    finders = {"mine": "noiseclr", "few": {"target": "ldm.evaluation.directions.finders.RandomRows"}}
    run = run_bench(tmp_path, judge=None, finders=finders, num_directions=3)
    report = json.loads((run / "direction_bench" / "2.json").read_text())
    assert [len(report["finders"][name]["directions"]) for name in ("mine", "few")] == [4, 3]
    assert report["no_effect_threshold"] > 0  # the control is found under another name
    assert report["factor_names"] == [] and report["finders"]["mine"]["owned_factors"] is None
    assert json.loads((run / "results.json").read_text())["owned_factors"] == {"mine": None, "few": None}


def test_seconds_are_those_of_the_directions_that_the_model_has_learned(tmp_path):
    stored = tmp_path / "other.safetensors"
    DirectionSet(torch.eye(FACTORS), "condition", ("a", "b", "c", "d"), "noiseclr").save(stored)
    report = json.loads((run_bench(tmp_path, finders=["noiseclr", str(stored)]) / "direction_bench/2.json").read_text())
    assert report["finders"]["noiseclr"]["seconds"] is not None and report["finders"]["other"]["seconds"] is None


def test_callback_checks_its_requirements_before_the_test_pass(tmp_path):
    world = World3D(limit=20)
    world.vocabulary = None
    with pytest.raises(UserError, match="with a vocabulary, got World3D"):
        run_bench(tmp_path, world)
    with pytest.raises(UserError, match=r"expected a judge of images of \(32, 32\) pixels"):
        run_bench(tmp_path, judge_params={"image_size": 16})
    space = {"names": ["a"], "sizes": [3]}
    with pytest.raises(UserError, match=r"factors with \[10, 10, 10.*got \(32, 32\) and \[3\]"):
        run_bench(tmp_path, judge_params={"space": space})
    with pytest.raises(UserError, match="checkpoint of a factor judge"):
        run_bench(tmp_path, judge=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="at most 16 directions, the features of the bottleneck, got 40"):
        run_bench(tmp_path, num_directions=40)
    with pytest.raises(ConfigError, match=r"finders: .*got .'random'"):
        run_bench(tmp_path, finders=["random", "random"])
    with pytest.raises(UserError, match=r"NaN or infinity in 4 of 4 directions"):
        run_bench(tmp_path, rows=torch.full((4, FACTORS), float("nan")))


def test_seconds_of_training_come_from_the_checkpoint(tmp_path):
    first, again, checkpoint = DirectionBench(), DirectionBench(), {"epoch": 0, "global_step": 2}
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, default_root_dir=tmp_path, accelerator="cpu")
    first.on_fit_start(trainer, None)
    first._began -= 100
    first.on_save_checkpoint(trainer, None, checkpoint)
    again.on_load_checkpoint(trainer, None, checkpoint)
    assert 100 <= again._seconds == first._seconds < 101
    again.on_fit_start(trainer, None)  # a resumed run
    again.on_save_checkpoint(trainer, None, checkpoint)
    assert 100 <= checkpoint["direction_seconds"] < 101
