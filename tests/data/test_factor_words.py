"""Words of the published factor sets."""

from __future__ import annotations

import numpy as np
import pytest

from ldm.config.signatures import find_signature
from ldm.data.describe import describe
from ldm.data.factors import FactorSpace, factor_space, space
from ldm.data.factors.cars3d import Cars3D
from ldm.data.factors.dsprites import DSprites
from ldm.data.factors.mpi3d import MPI3D
from ldm.data.factors.smallnorb import SmallNORB
from ldm.data.factors.words import factor_words

SETS = {"mpi3d": MPI3D, "cars3d": Cars3D, "dsprites": DSprites, "smallnorb": SmallNORB}
SIZES = {
    "mpi3d": (6, 2, 2, 3, 1, 2, 4),
    "cars3d": (4, 3, 5),
    "dsprites": (1, 3, 6, 4, 2, 2),
    "smallnorb": (5, 2, 9, 2, 2),
}


@pytest.mark.parametrize("name", ["mpi3d", "mpi3d_complex", "cars3d", "dsprites", "smallnorb"])
def test_every_value_has_a_word(name):
    known, vocabulary = factor_space(name), factor_words(name)
    assert vocabulary.factor_names == known.factor_names
    for words, positions, size in zip(vocabulary.words, vocabulary.value_to_word, known.factors_num_values):
        assert len(positions) == size and sorted(set(positions)) == list(range(len(words)))
        assert (np.diff(positions) >= 0).all() and len(set(words)) == len(words)
    phrases = [vocabulary.phrases(k, w) for k, words in enumerate(vocabulary.words) for w in range(len(words))]
    assert len({options[0] for options in phrases}) == len(phrases) and all("{" not in p for o in phrases for p in o)


def test_words_of_the_publications():
    vocabulary = factor_words("mpi3d")
    assert vocabulary.texts(np.array([[0, 3, 1, 0, 1, 39, 0]]))[0] == [
        "white object", "hexagonal prism", "large object", "camera at the top", "sea green background",
        "horizontal position 5", "vertical position 1",
    ]  # fmt: skip
    assert factor_words("mpi3d_complex").texts(np.array([[0, 2, 0, 2, 0, 0, 0]]))[0][:2] == [
        "yellow object",
        "croissant",
    ]
    assert factor_words("cars3d").texts(np.array([[3, 23, 182]])) == [
        ["elevation 4", "turned by 345 degrees", "car 183"]
    ]
    assert factor_words("dsprites").texts(np.array([[2, 5, 0, 31, 0]]))[0][:2] == ["heart", "large shape"]
    texts = factor_words("smallnorb").texts(np.array([[1, 8, 17, 5]]))[0]
    assert texts == ["human figure", "elevation 70 degrees", "turned by 340 degrees", "lighting 6"]


@pytest.mark.parametrize("name", SETS)
def test_batches_contain_attributes(name, tmp_path, monkeypatch):
    whole = factor_space(name)
    small = FactorSpace(whole.all_names, SIZES[name], whole.latent, name)
    monkeypatch.setitem(space._SPACES, name, small)
    channels = 3 if name in ("mpi3d", "cars3d") else 1
    pixels = np.random.RandomState(0).randint(0, 256, (small.size, 64, 64, channels), dtype=np.uint8)
    path = tmp_path / f"{name}.npy"
    np.save(path, pixels)
    data = SETS[name](path)
    batch = data.__getitems__([0, small.size - 1])
    assert (batch["attributes"] == batch["factors"]).all() and "text" not in batch
    assert describe(data, "num_attributes") == small.num_factors
    caption = SETS[name](path, text="caption", caption_weights=[1] * small.num_factors)[1]
    assert isinstance(caption["text"], str) and caption["caption_mask"].any()
    train, unseen = (SETS[name](path, holdout=0.3, split=split) for split in ("train", "validation"))
    assert len(train) and len(unseen) and unseen.__getitems__(range(len(unseen)))["unseen"].all()
    assert not train.__getitems__(range(len(train)))["unseen"].any()
    assert "vocabulary" not in find_signature(f"{type(data).__module__}.{type(data).__name__}").required
