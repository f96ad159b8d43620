"""TAD against a plain reading of its definition, and what it keeps and leaves out."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from ldm.metrics import MetricError, tad
from ldm.metrics.tad import detector_areas, redundancies


def plain_area(unit: np.ndarray, labels: np.ndarray) -> float:
    """One unit as a detector of one attribute, threshold by threshold."""
    low, high = unit.min(), unit.max()
    if high - low <= 0.2:
        return 0.5
    areas = []
    for is_positive in (True, False):
        rates = []
        for step in range(11):
            threshold = step / 10 * (high - low) + low
            chosen = unit >= threshold if is_positive else unit < threshold
            rates.append(
                ((chosen & (labels == 0)).sum() / (labels == 0).sum(), (chosen & (labels == 1)).sum() / labels.sum())
            )
        false, true = np.sort(np.array(rates), axis=0).T
        areas.append(sum(true[i] * (false[i] - false[i - 1]) for i in range(1, 11)))
    return max(areas)


@pytest.fixture
def attributes() -> np.ndarray:
    rng = np.random.default_rng(0)
    labels = (rng.random((400, 4)) < [0.5, 0.3, 0.5, 0.2]).astype(int)
    labels[:, 2] = np.where(rng.random(400) < 0.98, labels[:, 0], 1 - labels[:, 0])  # nearly decided by the first
    return labels


@pytest.fixture
def codes(attributes) -> np.ndarray:
    rng = np.random.default_rng(1)
    noise = rng.random((400, 4))
    return np.column_stack(
        [
            attributes[:, 1] + 0.3 * noise[:, 0],  # detects attribute 1
            -attributes[:, 0] + 0.5 * noise[:, 1],  # detects attribute 0 from below
            noise[:, 2],
            0.1 * attributes[:, 3],  # too small a range
        ]
    )


def test_areas_equal_the_definition(codes, attributes, monkeypatch):
    expected = np.array([[plain_area(unit, labels) for unit in codes.T] for labels in attributes.T])
    assert detector_areas(codes, attributes) == pytest.approx(expected)
    monkeypatch.setattr(sys.modules["ldm.metrics.tad"], "LOOKUP_ROWS", 100)
    assert detector_areas(codes, attributes) == pytest.approx(expected)


def test_redundancy_is_the_share_that_another_attribute_tells(attributes):
    found = redundancies(attributes)
    assert (found[[0, 2]] > 0.6).all() and (found[[1, 3]] < 0.05).all()
    table = np.array([[1, 0], [1, 1], [0, 0], [0, 0]])
    entropy, joint = (
        -(0.25 * np.log(0.25) + 0.75 * np.log(0.75)),
        0.25 * np.log(2) + 0.25 * np.log(2 / 3) + 0.5 * np.log(4 / 3),
    )
    assert redundancies(table) == pytest.approx([joint / np.log(2), joint / entropy])
    independent = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    assert redundancies(independent) == pytest.approx([0, 0], abs=1e-12)
    assert redundancies(independent[:, [0, 0]]) == pytest.approx([1, 1])


def test_score_sums_the_captured_attributes(codes, attributes):
    names = ("smiling", "hat", "laughing", "bald")
    found = tad(codes, attributes, names=names)
    areas = np.sort(detector_areas(codes, attributes), axis=1)
    assert found["captured"] == ["hat"]  # two others decide one another, the last is in a dead unit alone
    assert found["tad_score"] == found["TAD SCORE: "] == pytest.approx(areas[1, -1] - areas[1, -2])
    assert found["attributes_captured"] == found["Attributes Captured: "] == 1
    assert tad(codes, attributes, max_redundancy=1.0)["captured"] == [0, 1, 2]
    json.dumps(found)


def test_order_of_units_does_not_matter(codes, attributes):
    turned = tad(codes[:, ::-1], attributes)
    assert turned["captured"] == tad(codes, attributes)["captured"]
    assert turned["tad_score"] == pytest.approx(tad(codes, attributes)["tad_score"])


def test_noise_captures_nothing(attributes):
    found = tad(np.random.default_rng(5).normal(size=(400, 6)), attributes)
    assert (found["tad_score"], found["attributes_captured"]) == (0.0, 0)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"codes": np.zeros((400, 1))}, "at least 2"),
        ({"codes": np.zeros((399, 3))}, r"\(399, 3\) and \(400, 4\)"),
        ({"codes": np.full((400, 3), np.nan)}, "nan in unit 0"),
        ({"attributes": np.full((400, 4), -1)}, r"0 and 1, got \[-1\]"),
        ({"attributes": np.ones((400, 4))}, "attribute 0 is 1 in all 400 images"),
        ({"names": ("one",)}, "one for each of 4 attributes, got 1"),
    ],
)
def test_bad_input(codes, attributes, change, message):
    with pytest.raises(MetricError, match=message):
        tad(**({"codes": codes, "attributes": attributes} | change))
