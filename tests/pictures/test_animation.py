"""Animated GIFs: frames, durations, colors, errors."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from ldm.pictures.animation import save_gif
from ldm.pictures.draw import draw_grid
from ldm.pictures.grid import CaptionedGrid


def denoising(count=4, rows=("w = 0", "w = 1"), size=8):
    """Grids of two rows and two columns that go from noise to four colors."""
    colors = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [0.5, 0.5, -1]])
    clean = colors[:, :, None, None].expand(-1, -1, size, size)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    shares = torch.linspace(0, 1, count) if count > 1 else torch.ones(1)
    return [
        CaptionedGrid(s * clean + (1 - s) * noise, list(rows), ["a", "b"], f"t = {9 - i}") for i, s in enumerate(shares)
    ]


def read(path):
    """Return frames (n, H, W, 3), durations and the number of repetitions of a file."""
    with Image.open(path) as image:
        frames = [
            (np.asarray(frame.convert("RGB"), int), frame.info["duration"]) for frame in ImageSequence.Iterator(image)
        ]
        return np.stack([frame for frame, _ in frames]), [duration for _, duration in frames], image.info["loop"]


def test_clip_guided_frames_are_the_drawn_grids(tmp_path):
    grids = denoising()
    path = save_gif(grids, tmp_path / "new" / "denoising.gif")
    frames, durations, loop = read(path)
    assert path == tmp_path / "new" / "denoising.gif" and [file.name for file in path.parent.iterdir()] == [path.name]
    assert durations == [60, 60, 60, 1500] and loop == 0  # 0 repeats forever
    drawn = np.stack([np.asarray(draw_grid(grid), int) for grid in grids])
    assert frames.shape == drawn.shape
    assert abs(frames[-1] - drawn[-1]).mean() < 2  # the last frame is seen longest
    assert abs(frames - drawn).mean() < 12


def test_clip_guided_colors_do_not_flicker(tmp_path):
    grids = denoising(6)
    frames, _, _ = read(save_gif(grids, tmp_path / "a.gif"))
    drawn = np.stack([np.asarray(draw_grid(grid)) for grid in grids])
    constant = (drawn == drawn[:1]).all(axis=(0, -1))
    assert constant.mean() > 0.3 and (frames[:, constant] == frames[:1, constant]).all()
    assert (frames[:, 0, 0] == 255).all()  # the background


def test_one_frame_and_other_durations(tmp_path):
    assert read(save_gif(denoising(3), tmp_path / "a.gif", milliseconds=100, hold=400))[1:] == ([100, 100, 400], 0)
    frames, _, _ = read(save_gif(denoising(1), tmp_path / "b.gif"))
    assert len(frames) == 1


def test_equal_frames_keep_their_time(tmp_path):
    grid = denoising(1)[0]
    _, durations, _ = read(save_gif([grid, grid, grid], tmp_path / "a.gif", hold=500))
    assert sum(durations) == 620


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ([], "got no frames"),
        ([*denoising(2), *denoising(1, size=200)], "frames of one size, got .*x.*, .*x"),
        ([*denoising(2), *denoising(1, rows=("w = 0", "a longer caption"))], "captions of similar length"),
    ],
)
def test_bad_frames_are_refused_and_nothing_is_written(tmp_path, grids, message):
    with pytest.raises(ValueError, match=message):
        save_gif(grids, tmp_path / "bad.gif")
    assert not list(tmp_path.iterdir())
