"""Reading attributes off an image embedding."""

import torch
import torch.nn.functional as F

from ldm.modules.encoders.readout import AttributeReadout, centred_coordinates
from ldm.modules.encoders.zero_shot import attribute_hits, attribute_probabilities

WORDS = (10, 4, 1)


def vocabulary(width=32):
    torch.manual_seed(0)
    return [F.normalize(torch.randn(n, width), dim=-1) for n in WORDS]


def test_probabilities_sum_to_one_and_follow_the_texts():
    words = vocabulary()
    p = attribute_probabilities(3 * words[0], words, logit_scale=100.0)
    assert [tuple(q.shape) for q in p] == [(10, 10), (10, 4), (10, 1)]
    assert all(torch.allclose(q.sum(1), torch.ones(10)) for q in p)
    assert torch.equal(p[0].argmax(1), torch.arange(10))
    labels = torch.stack([torch.arange(10), p[1].argmax(1), torch.zeros(10, dtype=torch.long)], dim=1)
    assert attribute_hits(words[0], words, labels).all()


def test_coordinates_are_an_isometry_of_centred_points():
    points = vocabulary()[0]
    coordinates = centred_coordinates(points)
    assert coordinates.shape == (10, 9)
    assert torch.allclose(torch.cdist(coordinates, coordinates), torch.cdist(points, points), atol=1e-5)


def test_readout_is_the_posterior_mean_up_to_a_rotation():
    words = vocabulary()
    readout = AttributeReadout(words, logit_scale=10.0)
    images = torch.randn(50, 32)
    z = readout(images)
    assert z.shape == (50, 3, 9) and z.dtype == torch.float32
    for unit, p in enumerate(attribute_probabilities(images, words, 10.0)):
        expected = p @ words[unit]
        assert torch.allclose(torch.cdist(z[:, unit], z[:, unit]), torch.cdist(expected, expected), atol=1e-3)
    assert torch.equal(z[:, 1, 3:], torch.zeros(50, 6))
    assert torch.equal(z[:, 2], torch.zeros(50, 9))


def test_temperature_softens():
    words = vocabulary()
    sharp, soft = (AttributeReadout(words, 20.0, t)(words[0])[:, 0].norm(dim=1) for t in (1.0, 10.0))
    assert (soft < sharp).all()


def test_readout_moves_and_stays_out_of_checkpoints():
    readout = AttributeReadout(vocabulary(), 10.0)
    assert readout.state_dict() == {} and readout.width == 9 and readout.num_units == 3
    assert readout.to("meta").get_buffer("texts_0").device.type == "meta"
