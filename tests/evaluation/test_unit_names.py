"""Names of units by CLIP, for a model with known units and an encoder with known words."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from ldm.data.vocabulary import AttributeVocabulary
from ldm.diffusion.samplers import DDIMSampler
from ldm.evaluation.units.information import information_shares, names_of
from ldm.evaluation.units.names import agreement, clip_reader, judged_names, name_units, path_effects, traverse_units
from ldm.evaluation.units.report import caption_of, write_names

VOCABULARY = AttributeVocabulary(
    ("hue", "size"),
    (("red", "green", "blue"), ("small", "large")),
    ((0, 1, 2), (0, 1)),
    (("{} thing", "a {} thing"), ("{}",)),
)
POINTS = 4


class Painter:
    """Unit 0 paints the hue, unit 1 nothing at all, unit 2 the size."""

    latent_unit = 3
    latent_shape = (1, 2, 2)

    def encode_units(self, images):
        return torch.zeros(len(images), 3)

    def decode_units(self, codes, x_T, sampler=None, only=None):
        assert sampler.num_steps == 1
        images = torch.zeros(len(codes), 3, 4, 4)
        images[:, 0] = codes[:, 0].view(-1, 1, 1)
        images[:, 1] = codes[:, 2].view(-1, 1, 1)
        return images


class Texts:
    """Each word a direction of its own; phrasings of a word differ a little."""

    logit_scale = 20.0

    def vocabulary_embeddings(self, vocabulary):
        places = {"red": 0, "green": 1, "blue": 2, "small": 3, "large": 4}
        basis = torch.eye(6)
        found = []
        for phrases in vocabulary:
            place = next(places[word] for word in phrases[0].split() if word in places)
            found.append(torch.stack([basis[place] + 0.1 * number * basis[5] for number in range(len(phrases))]))
        return found


def see(images):
    """Red at -1, green at 0, blue at 1 in the first channel; small below 0 in the second, large above."""
    hue, size = images[:, 0, 0, 0], images[:, 1, 0, 0]
    parts = [hue < -0.5, hue.abs() <= 0.5, hue > 0.5, size < 0, size >= 0, torch.zeros_like(hue)]
    return torch.stack([part.float() for part in parts], dim=1) + 0.01


def all_paths():
    codes = torch.rand(200, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    base = codes[:8]
    return traverse_units(Painter(), codes, base, torch.zeros(8, 1, 2, 2), POINTS, DDIMSampler(1))


def named():
    return name_units(all_paths(), POINTS, clip_reader(Texts(), see, VOCABULARY), VOCABULARY)


def test_units_get_the_names_of_what_they_do():
    names = named()
    assert [name.name for name in names] == ["hue", "", "size"]
    assert names[0].words == ("red", "blue") and names[2].words == ("small", "large")
    assert names[0].confidence == names[2].confidence == 1.0
    assert names[1].effects.max() == 0.0
    assert caption_of(names[0]) == "unit 1: hue, red to blue (1.00)"
    assert caption_of(names[1]) == "unit 2: no name"


def test_effect_is_the_mean_change_of_the_posterior():
    posterior = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]])
    assert path_effects([posterior], 3).tolist() == [[pytest.approx(2 / 3)], [0.0]]


def test_confidence_is_low_where_images_disagree():
    """Half of the images show the hue, half the size."""
    reader = clip_reader(Texts(), see, VOCABULARY)
    posteriors = [torch.cat(part) for part in zip(*(reader(images) for images in [all_paths()[0], all_paths()[2]]))]
    from ldm.evaluation.units.names import name_unit

    assert 0.3 < name_unit(0, posteriors, POINTS, VOCABULARY).confidence < 1.0


def test_a_judge_agrees():
    def values_of(images):
        seen = see(images)
        return torch.stack([seen[:, :3].argmax(1), seen[:, 3:5].argmax(1)], dim=1)

    names = named()
    answers = judged_names(all_paths(), POINTS, values_of, VOCABULARY)
    assert answers == ["hue", "", "size"]
    for name, answer in zip(names, ("hue", "size", "hue")):
        name.checks["by_judge"] = answer
    assert agreement(names, "by_judge") == (1, 2)  # the unit CLIP does not name is nobody's


def test_files(tmp_path):
    names = named()
    names[0].checks["by_information"] = "hue"
    path = write_names(tmp_path, 700, names, VOCABULARY, all_paths(), POINTS, {"seed": 0})
    content = json.loads(path.read_text())
    assert path == tmp_path / "unit_names" / "700.json"
    assert content["units"][0]["unit"] == 1 and content["units"][0]["by_information"] == "hue"
    assert content["agreement"] == {"by_information": {"same": 1, "named_by_both": 1}}
    assert {entry.name for entry in path.parent.iterdir()} == {"700.json", "700_effects.png", "700_units.png"}


def test_information_finds_the_factor_of_a_unit():
    rng = np.random.RandomState(0)
    labels = np.stack([rng.randint(4, size=3000), rng.randint(3, size=3000)], axis=1)
    codes = np.stack([labels[:, 1] + 0.1 * rng.randn(3000), rng.randn(3000)], axis=1)
    shares = information_shares(codes, labels)
    assert shares[0, 1] > 0.9 and shares[0, 0] < 0.02 and shares[1].max() < 0.02
    assert names_of(shares, ("a", "b")) == ["b", ""]
