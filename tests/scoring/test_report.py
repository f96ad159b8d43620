"""The HTML reports: whole, self-contained, and showing what they should."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import score_cases as cases
from PIL import Image
from test_scoring import EngineInProcess

from ldm.metrics import select_metrics
from ldm.scoring import run as scoring
from ldm.scoring.report.build import _strongest, write_latents_report, write_reports
from ldm.scoring.report.pictures import run_pictures
from ldm.scoring.report.svg import Series, curves, heat_map, nice_ticks, strip
from ldm.scoring.run import Options, record_of, score_latents
from ldm.scoring.table import collect_rows, latents_row

METRICS = select_metrics("fast", ["mig", "dci"])
EMPTY = {"meta", "img", "rect", "line", "circle", "polyline"}  # tags without an end, as the page writes them


class Page(HTMLParser):
    """What a page holds; fails on tags that do not close in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "data", "action", "srcset")]
        assert not [name for name, _ in attrs if name.startswith("on")], "no script"
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in EMPTY:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def assert_self_contained(page: Page, path: Path) -> None:
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    style = re.search(r"<style>(.*?)</style>", path.read_text(), re.DOTALL).group(1)
    assert "url(" not in style and "@import" not in style
    assert "prefers-color-scheme: dark" in style and "@media print" in style


@pytest.fixture(scope="module")
def logdir(tmp_path_factory) -> Path:
    """Two runs of one experiment, two checkpoints each, one with pictures and a config that needs escaping."""
    root = tmp_path_factory.mktemp("report") / "logs"
    for seed in (0, 1):
        run = root / f"2026-01-01T00-00-00_<dis>_s{seed}"
        for step in (100, 200):
            noise = np.random.default_rng(seed).normal(scale=100 / step, size=(60, 4))
            factors = cases.SPACE.factors_of(np.arange(60))
            cases.write_latents(
                run,
                epoch=step,
                step=step,
                latents=noise + factors @ np.eye(3, 4),
                unit_names=np.array(["hue", "shape", "size", ""]),
            )
    first = root / "2026-01-01T00-00-00_<dis>_s0"
    (first / "configs").mkdir()
    (first / "configs/2026-01-01T00-00-00-project.yaml").write_text("note: <b>&amp;</b> $HOME\n")
    for split, name, size in (("test", "edit_grid", 1500), ("val", "samples", 40), ("val", "inputs", 40)):
        for step in (100, 200):
            path = first / "images" / split / f"{name}_gs-{step:06d}_e-000001_b-000000.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (size, 30), (step, 0, 0)).save(path)
    (first / "images/val/broken.png").write_bytes(b"no picture")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "Engine", EngineInProcess)
        report = cases.score(root, 1, seeds="0,1", metrics=METRICS, report=True)
    assert not report.failures
    return root


def test_reports_of_runs_and_of_their_comparison(logdir):
    written = write_reports(logdir, collect_rows(logdir, (0, 1)))
    assert [path.parent for path in written] == [*sorted(logdir.iterdir())[:2], logdir]
    for path in written:
        assert_self_contained(Page(path), path)
    run, comparison = Page(written[0]), Page(written[-1])
    assert "2026-01-01T00-00-00_<dis>_s0" in run.text and "note: <b>&amp;</b> $HOME" in run.text, "escaped"
    for heading in (
        "Scores",
        "Units and factors",
        "Scores over checkpoints",
        "Seeds of the metrics",
        "Pictures",
        "Settings of scoring",
    ):
        assert heading in run.text
    assert f"version of numpy{np.__version__}" in run.text.replace("\n", "") and "1 hue" in run.text
    assert run.tags.count("img") == 3 and comparison.tags.count("img") == 1
    assert "mean ± std of 2 runs" in comparison.text and "2 runs" in comparison.text
    assert run.tags.count("polyline") == 2 and comparison.tags.count("polyline") == 4
    heat_cells = 3 * 4 * 2  # factors, units; importances and informations
    assert run.tags.count("rect") == heat_cells and comparison.tags.count("rect") == 2 * heat_cells


def test_a_report_of_latents(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "Engine", EngineInProcess)
    factors = cases.SPACE.factors_of(np.arange(60))
    np.save(tmp_path / "f.npy", factors)
    np.save(tmp_path / "z.npy", factors.astype(float))
    out = tmp_path / "scores.json"
    options = Options(latents=tmp_path / "z.npy", factors=tmp_path / "f.npy", out=out, metrics=METRICS, report=True)
    score_latents(options)
    rows = latents_row(tmp_path / "z.npy", out, (0,), None)
    path = write_latents_report(rows[0], record_of(options), out)
    page = Page(path)
    assert path.name == "scores.html" and page.tags.count("rect") == 3 * 3 * 2
    assert_self_contained(page, path)


def test_runs_without_records_or_pictures_have_a_report_too(tmp_path):
    folder = tmp_path / "run/dis_metrics"
    folder.mkdir(parents=True)
    (folder / "5.json").write_text('{"dci": {"disentanglement": 0.5}}')
    path = write_reports(tmp_path, collect_rows(tmp_path))[0]
    page = Page(path)
    assert "0.500" in page.text and "Units and factors" not in page.text and "Pictures" not in page.text


def test_pictures_are_the_newest_of_each_kind_scaled_down(logdir):
    found = run_pictures(sorted(logdir.iterdir())[0])
    assert [picture.title.split("/")[-1] for picture in found] == [
        "edit_grid_gs-000200_e-000001_b-000000.png",
        "samples_gs-000200_e-000001_b-000000.png",
        "inputs_gs-000200_e-000001_b-000000.png",
    ]
    assert (found[0].width, found[0].height) == (1100, 22) and found[1].width == 40
    assert len(run_pictures(sorted(logdir.iterdir())[0], limit=1)) == 1


def test_heat_maps_number_their_cells():
    values = np.array([[1.0, 0.0], [0.25, 0.75]])
    text = heat_map(values, ["a <b>", "c"], ["0", "1"], "label")
    assert text.count("<rect") == 4 and 'fill-opacity="0.750"' in text and "a &lt;b&gt;" in text
    assert ">0.25<" in text and ">0.00<" not in text, "empty cells stay quiet"
    assert 'class="on">1.00' in text and 'class="off">0.25' in text
    assert heat_map(np.zeros((1, 60)), ["f"], [str(k) for k in range(60)], "wide").count("<text") == 61


def test_very_many_units_are_cut_to_the_strongest():
    values = np.linspace(0, 1, 500)[None, :].repeat(2, axis=0)
    kept, names = _strongest(values, ())
    assert kept.shape == (2, 80) and names[0] == "421" and kept.min() > 0.8


def test_curves_and_strips_keep_inside_their_frame():
    chart = curves([Series("s", [(0, 0.1), (10, 0.9)], [(10, 1.0)]), Series("t", [(5, 0.5)], (), 1)], "label")
    found = [float(value) for value in re.findall(r'c[xy]="([\d.]+)"', chart)]
    assert len(found) == 8 and 0 <= min(found) and max(found) <= 460
    assert chart.count("<polyline") == 1
    assert strip([("a", [("s0", 0.5)]), ("b", [("s0", 20.0), ("s1", 30.0)])], "label").count("<circle") == 3


@pytest.mark.parametrize(
    "low,high,expected", [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 0.3, [0, 0.1, 0.2, 0.3]), (5, 5, None), (0, 0, None)]
)
def test_ticks_are_round_and_reach_both_ends(low, high, expected):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and len(ticks) >= 2
    assert expected is None or ticks == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_chromium_has_nothing_to_complain_of(logdir, tmp_path):
    for number, path in enumerate(write_reports(logdir, collect_rows(logdir, (0, 1)))):
        picture = tmp_path / f"{number}.png"
        found = subprocess.run(
            [
                "chromium",
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--enable-logging=stderr",
                "--window-size=1240,1800",
                f"--screenshot={picture}",
                path.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert "CONSOLE" not in found.stderr
        with Image.open(picture) as image:
            colours = image.convert("RGB").getcolors(1_000_000)
        assert len(colours) > 20, "something was drawn"
