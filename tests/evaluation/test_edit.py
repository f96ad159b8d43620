"""The edit score: fake editors with known scores, properties of the protocol, and the files."""

import contextlib
import json

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from ldm.data.vocabulary import AttributeVocabulary
from ldm.data.world import World3D, world_vocabulary
from ldm.diffusion.samplers import DDIMSampler
from ldm.evaluation.editing.callback import EditScore
from ldm.evaluation.editing.measure import edit_grid, edit_score, plan_edits, summarise_edits
from ldm.evaluation.editing.truth import TruePictures
from ldm.models.judge import AttributeJudge
from ldm.util import UserError

VOCABULARY = world_vocabulary()
NUM_UNITS = VOCABULARY.num_units
LATENT = (2, 3, 3)
WORDS = [{VOCABULARY.phrases(k, w)[0]: w for w in range(len(VOCABULARY.words[k]))} for k in range(NUM_UNITS)]


def read(images):
    """Judge fake images: pixel k of channel 0 holds the value of factor k."""
    return images[:, 0].flatten(1)[:, :NUM_UNITS].mul(20).round().long()


def paint(values):
    """Return fake images (B, 3, 3, 3) that ``read`` judges as ``values`` (B, F)."""
    images = torch.zeros(len(values), 3, 9)
    images[:, 0, :NUM_UNITS] = torch.as_tensor(values) / 20
    return images.unflatten(2, (3, 3))


def values_of(texts):
    """Return the first factor value of each word."""
    words = [[WORDS[k][text] for k, text in enumerate(strings)] for strings in texts]
    first = [[int(np.flatnonzero(VOCABULARY.value_to_word[k] == w)[0]) for k, w in enumerate(row)] for row in words]
    return np.array(first)


def from_noise(x_T):
    """Return factor values that depend on the noise only, uniform over each factor."""
    uniform = torch.special.ndtr(x_T.flatten(1)[:, :NUM_UNITS].double()).numpy()
    sizes = np.array([len(values) for values in VOCABULARY.value_to_word])
    return np.minimum((uniform * sizes).astype(int), sizes - 1)


def score(sampler, num_samples=600, batch_size=100, seed=0):
    plan = plan_edits(VOCABULARY, LATENT, num_samples, seed)
    return edit_score(sampler, read, plan, batch_size)


def test_perfect_editor():
    result = score(lambda texts, x_T: paint(values_of(texts)))
    assert np.array_equal(result.matrix, np.eye(NUM_UNITS))
    assert result.edit_accuracy == 1 and result.edit_leakage == 0
    assert (result.base_accuracy == 1).all() and np.array_equal(result.value_changes, np.eye(NUM_UNITS))


def test_editor_that_ignores_text_scores_chance_and_does_not_leak():
    result = score(lambda texts, x_T: paint(from_noise(x_T)), num_samples=3000, batch_size=1000)
    assert result.edit_leakage == 0
    assert np.allclose(np.diag(result.matrix), result.chance, atol=0.03)
    assert np.allclose(result.base_accuracy, result.chance, atol=0.03)
    assert result.chance.tolist() == [0.1, 0.1, 0.1, 0.25, 0.25, 0.2]


def test_editor_that_changes_everything_leaks_all():
    base_words = {}

    def sampler(texts, x_T):
        values = values_of(texts)
        for row, noise in enumerate(x_T):
            key = noise.numpy().tobytes()
            if key not in base_words:  # the base images come first
                base_words[key] = values[row].copy()
                continue
            same = values[row] == base_words[key]
            sizes = np.array([len(v) for v in VOCABULARY.value_to_word])
            values[row, same] = sizes[same] - 1 - values[row, same]
            values[row, same & (values[row] == base_words[key])] += 1
        return paint(values)

    result = score(sampler, num_samples=200)
    assert result.edit_accuracy == 1 and result.edit_leakage > 0.9
    assert set(result.to_dict()["value_leakage"].values()) == {1.0}


def test_one_leaking_pair_is_found_in_its_cell():
    def sampler(texts, x_T):
        values = values_of(texts)
        values[:, 1] = values[:, 0]  # the wall takes the floor's hue
        return paint(values)

    result = score(sampler)
    assert result.matrix[0, 1] == 1 and result.matrix[0, 0] == 1
    assert result.matrix[1, 1] < 0.2 and np.abs(result.matrix[2:, 1]).max() == 0
    assert result.to_dict()["leakage"]["floor_hue"] == pytest.approx(1 / (NUM_UNITS - 1))


def test_values_that_share_a_word_leak_only_strictly():
    plan = plan_edits(VOCABULARY, LATENT, 4, seed=0)
    base = np.zeros((4, NUM_UNITS), dtype=np.int64)
    edited = np.repeat(base[None], NUM_UNITS, axis=0)
    edited[0, :, 3] = 1  # scale 0 -> 1: both are "tiny"
    result = summarise_edits(plan, base, edited)
    assert result.matrix[0, 3] == 0 and result.value_changes[0, 3] == 1
    assert result.to_dict()["value_leakage"]["floor_hue"] == pytest.approx(0.2) and result.edit_leakage == 0


def test_plan_asks_for_another_word_uniformly():
    plan = plan_edits(VOCABULARY, LATENT, 4000, seed=1)
    assert plan.asked.shape == (NUM_UNITS, 4000) and (plan.asked != plan.words.T).all()
    for k in range(NUM_UNITS):
        counts = np.bincount(plan.asked[k], minlength=len(VOCABULARY.words[k])) / 4000
        assert np.allclose(counts, 1 / len(VOCABULARY.words[k]), atol=0.03)
    texts = plan.edited_texts(3, plan.asked[3, :5], slice(0, 5))
    for strings, before in zip(texts, plan.base_texts(slice(0, 5))):
        assert [a != b for a, b in zip(strings, before)] == [k == 3 for k in range(NUM_UNITS)]


def test_same_seed_same_score_whatever_the_batch_size():
    def sampler(texts, x_T):
        return paint((values_of(texts) + from_noise(x_T)) % 4)

    matrices = [score(sampler, 90, batch_size).matrix for batch_size in (90, 90, 32)]
    assert np.array_equal(matrices[0], matrices[1]) and np.array_equal(matrices[0], matrices[2])
    assert not np.array_equal(matrices[0], score(sampler, 90, seed=5).matrix)


def test_noise_drawn_on_the_way_is_the_same_for_an_image_and_its_edits():
    def sampler(texts, x_T):
        return paint(torch.randint(0, 4, (len(texts), NUM_UNITS)))

    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert (score(sampler, 50, 20).value_changes == 0).all()
    assert torch.equal(state, torch.get_rng_state())


def test_a_diverged_model_is_not_scored():
    with pytest.raises(UserError, match="in 2 of 2 sampled images"):
        score(lambda texts, x_T: paint(values_of(texts)) * float("nan"), num_samples=2)


def test_plans_that_are_not_possible():
    one_word = AttributeVocabulary(("colour",), [["red", "blue"]], [[0, 0]], [["{}"]])
    with pytest.raises(ValueError, match="single word"):
        plan_edits(one_word, LATENT, 4, seed=0)
    with pytest.raises(ValueError, match="num_samples=0"):
        plan_edits(VOCABULARY, LATENT, 0, seed=0)


def test_grid_asks_a_whole_row_for_one_word():
    plan = plan_edits(VOCABULARY, LATENT, 10, seed=0)
    grid = edit_grid(lambda texts, x_T: paint(values_of(texts)), plan, columns=4)
    assert grid.images.shape == (7 * 4, 3, 3, 3) and len(grid.rows) == 7 and len(grid.columns) == 4
    values = read(grid.images).reshape(7, 4, NUM_UNITS)
    for k in range(NUM_UNITS):
        assert len(values[k + 1, :, k].unique()) == 1
        assert VOCABULARY.factor_names[k].replace("_", " ") in grid.rows[k + 1]
    assert grid.columns[0].split("\n") == plan.base_texts(slice(0, 1))[0]


def test_judge_is_judged_on_held_out_images():
    def perfect(images):
        start = sum(sizes)
        sizes.append(len(images))
        return torch.from_numpy(world.space.factors_of(held_out[start : start + len(images)]))

    world, held_out, sizes = World3D(limit=10), World3D(split="validation").rows, []
    accuracy, count = TruePictures(world, perfect, batch_size=300).judge_accuracy()
    assert (accuracy == 1).all() and count == sum(sizes) == len(held_out)
    assert not np.isin(held_out, World3D(split="train").rows).any()


class Averaged(pl.LightningModule):
    """A model with averaged weights and an empty test step."""

    latent_shape = LATENT
    is_averaged = False

    @contextlib.contextmanager
    def ema_scope(self):
        self.is_averaged = True
        yield
        self.is_averaged = False

    def test_step(self, batch, batch_idx):
        return None


class Painter(Averaged):
    """A model that paints its text, larger, and only within its averaged weights."""

    latent_unit = NUM_UNITS

    def sample_edit(self, texts, x_T, sampler=None, guidance_scale=1.0, only=None):
        assert self.is_averaged and not torch.is_grad_enabled()
        assert (type(sampler), sampler.num_steps, sampler.eta, guidance_scale) == (DDIMSampler, 3, 0.0, 1.5)
        return torch.nn.functional.pad(paint(values_of(texts)), (0, 29, 0, 29))


def run_test_pass(tmp_path, build_callback, model, dataset=None, **options):
    """Run the test pass with a callback that gets an untrained judge and a sampler of three steps."""
    judge = AttributeJudge(space="shapes3d", channels=4, hidden=8)
    torch.save({"hyper_parameters": dict(judge.hparams), "state_dict": judge.state_dict()}, tmp_path / "judge.ckpt")
    sampler = {"target": "ldm.diffusion.samplers.DDIMSampler", "params": {"num_steps": 3}}
    callback = build_callback(**{"judge": tmp_path / "judge.ckpt", "sampler": sampler, "batch_size": 4} | options)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(**quiet, callbacks=[callback], default_root_dir=tmp_path / "run")
    loader = DataLoader(dataset or World3D(limit=20), batch_size=10, collate_fn=lambda batch: batch)
    trainer.test(model, loader, verbose=False)
    return tmp_path / "run"


def run_callback(tmp_path, model=None, dataset=None, **options):
    options = {"num_samples": 6, "columns": 3, "guidance_scale": 1.5} | options
    return run_test_pass(tmp_path, EditScore, model or Painter(), dataset, **options)


def test_callback_leaves_numbers_and_pictures(tmp_path):
    run = run_callback(tmp_path)
    report = json.loads((run / "edit_score" / "0.json").read_text())
    assert np.array(report["matrix"]).shape == (6, 6)
    assert report["num_samples"] == 6 and report["step"] == 0
    ddim = {"name": "ddim", "num_steps": 3, "eta": 0.0, "spacing": "uniform", "temperature": 1.0}
    assert report["sampler"] == {**ddim, "guidance_scale": 1.5, "seed": 0}
    assert report["judge"]["num_images"] == 1000 and 0 <= report["judge"]["accuracy"] <= 1
    assert set(report["chance"]) == set(VOCABULARY.factor_names)
    assert (run / "edit_score" / "0.png").is_file()
    assert [path.name for path in (run / "images" / "test").iterdir()] == ["edit_grid_gs-000000_e-000000_b-000000.png"]
    results = json.loads((run / "results.json").read_text())
    means = ("edit_accuracy", "edit_leakage", "all_right", "edit_accuracy_ceiling", "edit_leakage_ceiling")
    expected = {name: report[name] for name in (*means, "edit_accuracy_chance")}
    expected["judge_accuracy"] = report["judge"]["accuracy"]
    for name in VOCABULARY.factor_names:
        expected[f"edit_accuracy_{name}"] = report["accuracy"][name]
        expected[f"edit_leakage_{name}"] = report["leakage"][name]
    assert results == expected
    assert report["edit_accuracy_chance"] == pytest.approx(sum(report["chance"].values()) / 6, abs=1e-6)
    assert report["ceiling"]["num_samples"] == 6


def test_callback_checks_its_requirements_before_the_test_pass(tmp_path):
    with pytest.raises(UserError, match="checkpoint of a factor judge"):
        run_callback(tmp_path, judge=tmp_path / "nowhere")

    class Silent(Painter):
        sample_edit = property()

    with pytest.raises(UserError, match="lacks sample_edit.*Editable"):
        run_callback(tmp_path, model=Silent())

    class Narrow(Painter):
        latent_unit = 5

    with pytest.raises(UserError, match="latent_unit 5 and 6 attributes"):
        run_callback(tmp_path, model=Narrow())
    world = World3D(limit=20)
    world.vocabulary = None
    with pytest.raises(UserError, match="with a vocabulary, got World3D"):
        run_callback(tmp_path, dataset=world)
