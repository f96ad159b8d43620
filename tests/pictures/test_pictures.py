"""Pictures: sizes, captions without loss, pixels, files."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.pictures import draw as pictures
from ldm.pictures.captions import fit_captions
from ldm.pictures.charts import _moving_average, heat_map, heat_maps, loss_chart, score_chart
from ldm.pictures.draw import draw_grid, draw_images, save_png
from ldm.pictures.grid import CaptionedGrid


def test_pixels_round_and_clip():
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).reshape(1, 1, 1, 5)
    assert pictures.to_pixels(values)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_nan_pixels_are_magenta(caplog):
    images = torch.zeros(1, 3, 2, 2)
    images[0, 1, 0, 0] = float("nan")
    pixels = pictures.to_pixels(images)
    assert pixels[0, 0, 0].tolist() == [255, 0, 255]
    assert pixels[0, 1, 1].tolist() == [128, 128, 128]
    assert "NaN" in caplog.text


def test_small_images_are_enlarged_by_a_whole_factor():
    images = torch.rand(2, 3, 5, 4) * 2 - 1
    large = pictures.enlarge(images, min_side=10)
    assert large.shape == (2, 15, 12, 3)
    assert (large[:, ::3, ::3] == pictures.to_pixels(images)).all()
    assert pictures.enlarge(images, min_side=3).shape == (2, 5, 4, 3)


def test_images_are_drawn_in_reading_order():
    images = torch.linspace(-1, 1, 5).reshape(5, 1, 1, 1).expand(5, 3, 8, 8)
    sheet = np.asarray(draw_images(images, columns=3, min_side=8))
    margin, pitch = pictures.MARGIN, 8 + pictures.GAP
    assert sheet.shape == (2 * pitch - pictures.GAP + 2 * margin, 3 * pitch - pictures.GAP + 2 * margin, 3)
    for index in range(5):
        row, column = divmod(index, 3)
        y, x = margin + row * pitch, margin + column * pitch
        assert (sheet[y : y + 8, x : x + 8] == pictures.to_pixels(images)[index]).all()


def test_grid_grows_with_its_captions():
    images = torch.zeros(6, 3, 32, 32)
    bare = draw_grid(CaptionedGrid(images, ["", ""], []))
    rows = draw_grid(CaptionedGrid(images, ["base", "floor hue → green floor"], []))
    both = draw_grid(CaptionedGrid(images, ["base", "floor hue → green floor"], ["a", "b", "c"], "A title"))
    assert bare.width == 2 * pictures.MARGIN + 3 * 96 + 2 * pictures.GAP
    assert rows.width > bare.width and rows.height == bare.height
    assert both.height > rows.height and both.width == rows.width


@pytest.mark.parametrize("text", ["x" * 300, "many words " * 40, "two\nlines", "", "  spaced   out "])
def test_captions_keep_every_letter(text):
    captions = fit_captions([text, "short"], width=60, height=40, largest=14)
    assert "".join("".join(captions.lines[0]).split()) == "".join(text.split())
    assert captions.widest <= 60


def test_long_captions_make_a_taller_grid():
    images = torch.zeros(1, 3, 32, 32)
    short = draw_grid(CaptionedGrid(images, ["short"], ["short"]))
    long = draw_grid(CaptionedGrid(images, ["word " * 200], ["x" * 400]))
    assert long.height > 2 * short.height


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 8, 8), (0, 3, 8, 8)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="got"):
        draw_images(torch.zeros(shape))


@pytest.mark.parametrize(("rows", "columns"), [(["a", "b"], ["x", "y"]), (["a", "b"], []), ([], ["x", "y"])])
def test_grid_with_the_wrong_number_of_images_is_refused(rows, columns):
    with pytest.raises(ValueError, match="3 images"):
        draw_grid(CaptionedGrid(torch.zeros(3, 3, 4, 4), rows, columns, "swap"))


def test_heat_map_and_png(tmp_path):
    path = heat_map(np.array([[1.0, np.nan]]), ["a"], ["b", "c"], "scores", tmp_path / "new" / "map.png")
    picture = save_png(draw_images(torch.zeros(1, 3, 4, 4), "title"), tmp_path / "new" / "sheet.png")
    assert {file.name for file in path.parent.iterdir()} == {"map.png", "sheet.png"}
    assert Image.open(path).size > (100, 100) and Image.open(picture).mode == "RGB"


def test_heat_map_names_must_match():
    with pytest.raises(ValueError, match="shape"):
        heat_map(np.zeros((2, 2)), ["a"], ["b", "c"], "scores", "unused.png")


def test_heat_map_is_the_heat_maps_of_one_matrix(tmp_path):
    matrix, rows, columns = np.array([[0.2, np.nan], [1.0, 0.0]]), ["a", "two\nlines"], ["c", "d"]
    one = heat_map(matrix, rows, columns, "scores", tmp_path / "one.png")
    same = heat_maps({"scores": matrix}, rows, columns, "", tmp_path / "same.png")
    assert one.read_bytes() == same.read_bytes()


def test_clip_guided_heat_maps_side_by_side(tmp_path):
    matrix, rows, columns = np.array([[1.4, -0.3], [0.5, np.nan]]), ["a red ball", "a blue ball"], ["1", "2"]
    one = heat_maps({"CLIP": matrix}, rows, columns, "similarity", tmp_path / "one.png")
    two = heat_maps({"CLIP": matrix, "judge": matrix}, rows, columns, "similarity", tmp_path / "two.png")
    long = heat_maps({"CLIP": matrix, "judge": matrix}, ["word " * 60] * 2, columns, "", tmp_path / "long.png")
    (width, height), wide, tall = (Image.open(path).size for path in (one, two, long))
    assert wide[0] > 1.3 * width and wide[1] == height
    assert tall[0] == wide[0] and tall[1] > 1.5 * height  # rows are wrapped, not cut off


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        ({}, "got none"),
        ({"CLIP": np.zeros((1, 2)), "judge": np.zeros((2, 1))}, r"\(1, 2\), one row.*\(2, 1\) for 'judge'"),
    ],
)
def test_clip_guided_heat_maps_must_match(tmp_path, matrices, message):
    with pytest.raises(ValueError, match=message):
        heat_maps(matrices, ["a"], ["b", "c"], "similarity", tmp_path / "unused.png")
    assert not list(tmp_path.iterdir())


def test_loss_chart(tmp_path):
    steps = np.arange(200.0)
    noisy = np.exp(-steps / 30) + 0.01
    noisy[50:60] = np.nan
    panels = {
        "loss": {"train": np.stack([steps, noisy]), "validation": np.array([[0.0, 100, 199], [1.0, 0.3, 0.1]])},
        "constant": {"train": np.array([[0.0, 1.0], [2.0, 2.0]])},
        "negative": {"train": np.stack([steps, -noisy])},
        "diverged": {"train": np.full((2, 3), np.nan)},
    }
    rates = {"Adam": np.stack([steps, np.linspace(1e-3, 1e-5, 200)])}
    width, height = Image.open(loss_chart({"loss": panels["loss"]}, {}, tmp_path / "one.png")).size
    assert Image.open(loss_chart(panels, rates, tmp_path / "losses.png")).size == (3 * width, 2 * height)
    assert Image.open(loss_chart({"loss": panels["loss"]}, rates, tmp_path / "two.png")).size == (2 * width, height)


def test_moving_averages_skip_values_that_are_not_finite():
    values = np.array([1.0, 3.0, np.nan, np.inf, np.nan, 5.0])
    np.testing.assert_allclose(_moving_average(values, 3), [2, 2, 3, np.nan, 5, 5])
    np.testing.assert_array_equal(_moving_average(values[:2], 1), [1, 3])


def test_score_chart_with_a_gap_and_a_baseline(tmp_path):
    curves = {"MIG": [0.1, float("nan"), 0.3], "DCI": [float("nan")] * 3}
    path = score_chart([1, 2, 3], curves, {"MIG": 2}, {"MIG": 0.2, "DCI": 0.1}, "PCA", tmp_path / "scores.png")
    width, height = Image.open(path).size
    assert width > 500 and height > 300
