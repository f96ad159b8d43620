"""The prompt score of the CLIP-guided DDPM and other models sampled from texts: fake samplers, and the files."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_edit import LATENT, NUM_UNITS, VOCABULARY, Averaged, from_noise, paint, read, run_test_pass, values_of

from ldm.data.world import World3D
from ldm.diffusion.conditions import TensorCondition
from ldm.diffusion.samplers import DDIMSampler
from ldm.evaluation.prompts.callback import PromptScore
from ldm.evaluation.prompts.measure import plan_prompts, prompt_score
from ldm.util import ConfigError, UserError


class PixelJudge:
    """Judge of the fake images, whose features are the values and a constant."""

    def predict_values(self, images):
        return read(images)

    def features(self, images):
        return torch.nn.functional.pad(read(images).float(), (0, 1), value=1.0)


class FakeWorld(World3D):
    """The world with fake images that the judge reads without an error."""

    def images(self, rows):
        values = torch.from_numpy(self.space.factors_of(rows))
        return ((paint(values).movedim(1, -1) + 1) * 127.5).round().to(torch.uint8).numpy()


def score(sampler, strengths=(0.0,), num_prompts=400, batch_size=100, seed=0):
    plan = plan_prompts(FakeWorld(limit=4000), LATENT, num_prompts, seed)

    def sample(part, x_T, w):
        return sampler(plan.texts[part], x_T, w)

    return prompt_score(sample, PixelJudge(), plan, strengths, batch_size)


def of_prompts(texts):
    return values_of([text.split(", ") for text in texts])


def test_sampler_that_follows_the_prompt_is_right_in_everything():
    result = score(lambda texts, x_T, w: paint(of_prompts(texts)))
    assert (result.accuracy == 1).all() and (result.real_accuracy == 1).all()
    assert result.to_dict()["mean_accuracy"] == [1.0]


def test_sampler_without_the_prompt_is_at_chance():
    result = score(lambda texts, x_T, w: paint(from_noise(x_T)), num_prompts=2000, batch_size=500)
    assert np.allclose(result.accuracy[0], result.chance, atol=0.04)
    assert result.chance.tolist() == [0.1, 0.1, 0.1, 0.25, 0.25, 0.2]


def test_every_strength_has_its_row_and_its_own_samples():
    def sampler(texts, x_T, w):
        values = of_prompts(texts)
        values[:, 0] = values[:, 0] if w > 0 else 0
        return paint(values)

    result = score(sampler, strengths=(-1.0, 2.0))
    assert result.accuracy[0, 0] == pytest.approx(0.1, abs=0.05) and (result.accuracy[:, 1:] == 1).all()
    assert result.accuracy[1, 0] == 1 and result.distance[0] > result.distance[1]
    assert result.to_dict()["accuracy"]["floor_hue"] == [round(result.accuracy[0, 0], 6), 1.0]


def test_all_strengths_and_batch_sizes_share_the_noise():
    seen = {}

    def sampler(texts, x_T, w):
        seen.setdefault(w, []).append(x_T)
        return paint((of_prompts(texts) + from_noise(x_T)) % 4)

    first = score(sampler, (0.0, 1.0), 60, 60)
    assert torch.equal(seen[0.0][0], seen[1.0][0]) and np.array_equal(first.accuracy[0], first.accuracy[1])
    assert np.array_equal(score(sampler, (0.0,), 60, 32).accuracy[0], first.accuracy[0])


def test_prompts_are_those_of_distinct_images_of_the_data_set():
    world = FakeWorld(split="validation", holdout=0.1, limit=300)
    plan = plan_prompts(world, LATENT, 100, seed=3)
    assert len(plan.texts) == len(plan.images) == len(plan.others) == len(plan.noise) == 100
    train = FakeWorld(split="train", holdout=0.1)
    known = {tuple(row) for row in VOCABULARY.word_labels(train.space.factors_of(train.rows)).tolist()}
    assert not known & {tuple(row) for row in plan.words.tolist()}
    assert plan.texts != plan_prompts(world, LATENT, 100, seed=4).texts
    with pytest.raises(ConfigError, match=r"num_prompts of 2 to 150, .* got 151"):
        plan_prompts(world, LATENT, 151, seed=3)
    assert len(plan_prompts(world, LATENT, None, seed=3).texts) == 150  # half of the images


def test_prompts_from_a_template():
    template = "a {scale} {object_hue} {shape}, {wall_hue} wall"
    plan = plan_prompts(FakeWorld(limit=400), LATENT, 20, 0, template)
    plain = plan_prompts(FakeWorld(limit=400), LATENT, 20, 0)
    assert np.array_equal(plan.words, plain.words) and plan.texts != plain.texts
    words = [VOCABULARY.words[k][word] for k, word in enumerate(plan.words[0])]
    assert plan.texts[0] == f"a {words[3]} {words[2]} {words[4]}, {words[1]} wall"
    for wrong in ("a {size} object", "a {} object", "a {scale"):
        with pytest.raises(ConfigError, match=r"template: expected fields \{floor_hue\}, .*got 'a \{"):
            plan_prompts(FakeWorld(limit=400), LATENT, 20, 0, wrong)


def test_diverged_samples_are_not_scored():
    with pytest.raises(UserError, match=r"prompt score: expected finite images.*in 100 of 100"):
        score(lambda texts, x_T, w: paint(of_prompts(texts)) * float("nan"))


class Painter(Averaged):
    """A model that paints its text within its averaged weights only; without guidance it paints noise."""

    embeds_images = True

    def condition_from_texts(self, texts):
        return TensorCondition(torch.as_tensor(of_prompts(texts)).float())

    def sample(self, x_T, cond, sampler, guidance_scale, callback=None):
        assert self.is_averaged and not torch.is_grad_enabled()
        assert (type(sampler), sampler.num_steps) == (DDIMSampler, 3) and guidance_scale in (0.0, 2.0)
        values = cond.value if guidance_scale else torch.as_tensor(from_noise(x_T)).float()
        if callback is not None:

            class Step:
                x = pred_x0 = values

            callback(Step)
            callback(Step)
        return values

    def decode_first_stage(self, z):
        return torch.nn.functional.pad(paint(z), (0, 29, 0, 29))

    def joint_embeddings(self, images, texts):
        words = torch.nn.functional.one_hot(torch.as_tensor(of_prompts(texts)), 15).flatten(1).float()
        return words + 1, words

    def condition_from_images(self, images):
        return TensorCondition(torch.zeros(len(images), NUM_UNITS))


def run_callback(tmp_path, model=None, dataset=None, **options):
    options = {"num_prompts": 6, "rows": 3, "guidance": 1.0, "strengths": (-1.0, 1.0)} | options
    return run_test_pass(tmp_path, PromptScore, model or Painter(), dataset, **options)


def test_callback_leaves_numbers_and_pictures(tmp_path):
    run = run_callback(tmp_path)
    report = json.loads((run / "prompt_score" / "0.json").read_text())
    assert report["strengths"] == [-1.0, 1.0] and len(report["mean_accuracy"]) == len(report["distance"]) == 2
    assert list(report["accuracy"]) == list(VOCABULARY.factor_names) and report["num_prompts"] == 6
    assert report["sampler"]["guidance"] == 1.0 and report["sampler"]["num_steps"] == 3
    results = json.loads((run / "results.json").read_text())
    assert results["prompt_accuracy"] == report["mean_accuracy"][1]
    assert results["prompt_accuracy_shape"] == report["accuracy"]["shape"][1]
    assert results["prompt_distance"] == report["distance"][1]
    assert 0 < results["modality_gap_before"] < 1 and 0 < results["pair_cosine_before"] < 1
    assert 0 <= results["prompt_accuracy_from_images"] <= 1 and results["pair_cosine"] == 0
    assert (run / "prompt_score" / "0.png").is_file()
    pictures = sorted(path.name for path in (run / "images" / "test").iterdir())
    stamp = "gs-000000_e-000000_b-000000.png"
    assert pictures == ["denoising_gs-000000_e-000000_b-000000.gif", f"prompts_{stamp}", f"similarity_{stamp}"]
    with Image.open(run / "images" / "test" / pictures[0]) as animation:
        assert animation.format == "GIF"


def test_callback_of_a_model_without_a_joint_space(tmp_path):
    class Plain(Painter):
        embeds_images = False

    assert "modality_gap" not in json.loads((run_callback(tmp_path, Plain()) / "results.json").read_text())


def test_callback_checks_its_requirements_before_the_test_pass(tmp_path):
    with pytest.raises(UserError, match="checkpoint of a factor judge"):
        run_callback(tmp_path, judge=tmp_path / "nowhere")

    class Silent(Painter):
        condition_from_texts = property()

    with pytest.raises(UserError, match=r"lacks condition_from_texts.*SampledFromTexts"):
        run_callback(tmp_path, model=Silent())

    class Untold(Painter):
        def condition_from_texts(self, texts):
            raise UserError("CLIP: expected a text encoder")

        def test_step(self, batch, batch_idx):
            pytest.fail("the test pass was started")

    with pytest.raises(UserError, match="expected a text encoder"):
        run_callback(tmp_path, model=Untold())
    world = World3D(limit=20)
    world.vocabulary = None
    with pytest.raises(UserError, match="with a vocabulary, got World3D"):
        run_callback(tmp_path, dataset=world)
    with pytest.raises(ConfigError, match=r"guidance: expected one of strengths \[-1.0, 1.0\], got 0.5"):
        PromptScore("judge", guidance=0.5, strengths=(-1.0, 1.0))
