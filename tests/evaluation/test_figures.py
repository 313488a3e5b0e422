import importlib.util
import sys
import warnings

import numpy as np
import pytest
import torch
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.text import Text

import idloss.evaluation.figures as figures_module
from idloss.evaluation.figures import (
    accuracy_figure,
    cmc_figure,
    method_styles,
    picture_sheet,
    roc_figure,
    save_figure,
    similarity_figure,
)
from idloss.evaluation.report import write_figures
from idloss.evaluation.results import HR, Cell, Results
from idloss.evaluation.statistics import estimate
from idloss.evaluation.verification import roc

METHODS = ("bilinear", "bicubic", "edsr16_64", "edsr16_64_id", "edsr32_256", "edsr32_256_id")
SIZES = ((7, 6), (14, 12), (16, 16), (28, 24))
LONG = "timm/vit_tiny_patch8_112.arcface_ms1mv3"
STYLES = method_styles([*METHODS, LONG])
ODD = ("_hidden", "$\\frac{1}", "100 % \x1b[2J", "\u0416\u03bb", "local-dir:/" + "very_long/" * 12)


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Draw few pixels: it is quicker."""
    monkeypatch.setattr(figures_module, "_DPI", 20)


@pytest.fixture(scope="module")
def run():
    rng = np.random.default_rng(0)
    results = Results()
    for fnet in ("sface", LONG):
        for number, name in enumerate(METHODS):
            for step, size in enumerate(SIZES):
                value = 0.5 + 0.02 * number + 0.1 * step
                repeats = value + 0.01 * rng.standard_normal(10)
                if name == METHODS[0]:
                    repeats = [value - 0.2, value + 0.2]  # an interval beyond 0 and 100 %
                cell = Cell("verification", fnet, name, *size)
                results.add(cell, {"accuracy": estimate(repeats)})
        results.add(Cell("verification", fnet, HR, 112, 96), {"accuracy": estimate([0.99])})
    return results


@pytest.fixture(scope="module")
def scores():
    rng = np.random.default_rng(0)
    same = np.arange(600) % 2 == 0
    methods = (*METHODS, LONG)
    return {name: 0.2 * same + 0.15 * rng.standard_normal(600) for name in methods}, same


def rocs(scores, methods):
    values, same = scores
    return {name: roc(row, same) for name, row in zip(methods, values.values(), strict=False)}


def sheet():
    hr = torch.rand(3, 3, 112, 96, generator=torch.Generator().manual_seed(0))
    lr = (hr[..., ::8, ::8] * 255).to(torch.uint8)
    columns = {"lr": lr, "bicubic": hr * 0.5, "edsr32_256_id": hr * 0.8, HR: hr}
    cosines = {"bicubic": [0.1, 0.9, 0.3], "edsr32_256_id": [0.5, 0.6, 0.7], HR: [1.0, 1.0, 1.0]}
    return picture_sheet(columns, cosines, names=["A", "B", "C"], title="LFW at 14x12")


def require_readable(name, figure):
    """Nothing is cut off, nothing overlaps."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    beyond = set()  # labels of ticks beyond an axis' limits exist, but are not drawn
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            if not low <= tick.get_loc() <= high:
                beyond |= {tick.label1, tick.label2}
    texts = (text for text in figure.findobj(Text) if text.get_visible() and text not in beyond)
    drawn = [(text.get_text(), text.get_window_extent()) for text in texts]
    drawn = [(text, box) for text, box in drawn if text.strip()]
    assert len(drawn) > 10
    for place, (text, box) in enumerate(drawn):
        assert min(box.x0, box.y0) >= -1, (name, text)
        assert max(box.x1 - width, box.y1 - height) <= 1, (name, text)
        for other_text, other in drawn[place + 1 :]:
            across = min(box.x1, other.x1) - max(box.x0, other.x0)
            down = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert min(across, down) <= 1, (name, text, other_text)


def test_figures_are_saved_and_nothing_is_cut_off_or_overlaps(run, scores, tmp_path):
    values, same = scores
    title = "LFW, sface, 14x12"
    cmc = {name: np.linspace(0.2, 0.9, 20) + np.zeros((10, 1)) for name in values}
    for name, figure in {
        "accuracy": accuracy_figure(run, "verification", STYLES),
        "roc": roc_figure(rocs(scores, values), title, STYLES),
        "cmc": cmc_figure(cmc, title, STYLES),
        "similarity": similarity_figure(values, same, dict.fromkeys(values, 0.1), title),
        "sheet": sheet(),
    }.items():
        png, pdf = save_figure(figure, tmp_path / "figures" / f"{name}.png")
        assert png.read_bytes().startswith(b"\x89PNG")
        assert pdf.read_bytes().startswith(b"%PDF")
        require_readable(name, figure)


@pytest.mark.filterwarnings("error:Glyph")
@pytest.mark.parametrize("title", ["LFW", ", ".join(ODD)], ids=["short", "odd"])
def test_odd_names_are_shown_as_they_are(scores, title, tmp_path):
    values, same = scores
    styles = method_styles(ODD)
    for figure in (
        roc_figure(rocs(scores, ODD), title, styles),
        similarity_figure({ODD[0]: values["bicubic"]}, same, {}, title),
        cmc_figure({name: [0.1, 0.2] for name in ODD}, title, styles),
    ):
        require_readable(title, figure)
        shown = " ".join(text.get_text() for text in figure.findobj(Text))
        assert "_hidden" in shown
        assert "\x1b" not in shown
    assert len(save_figure(figure, tmp_path / "odd")) == 2


def test_letters_come_from_another_font_or_are_named(scores, monkeypatch, tmp_path):
    """A font that matplotlib brings beside its first one stands for one that holds the letter."""

    def drawn(name):
        return roc_figure(rocs(scores, [name]), "", method_styles([name]))

    with pytest.warns(UserWarning, match="no installed font holds .*drawn as boxes; install one"):
        assert save_figure(drawn("\u6c49\uf8f8"), tmp_path / "boxes")
    other = next(f for f in font_manager.fontManager.ttflist if f.name == "STIXGeneral")
    first = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
    theirs = font_manager.get_font(other.fname).get_charmap()
    letter = next(chr(code) for code in theirs if code not in first and chr(code).isprintable())
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [other])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_figure(figure := drawn(letter), tmp_path / "another")
    families = {tuple(t.get_fontfamily()) for t in figure.findobj(Text) if letter in t.get_text()}
    assert families == {("sans-serif", "STIXGeneral")}


@pytest.mark.parametrize("circumstances", [{}, {"protocol": "paper"}, {"protocol": {"rule": 5}}])
def test_runs_of_any_kind_are_drawn_and_no_file_is_written_twice(circumstances, tmp_path):
    """Names that fall together in file names, and circumstances that say nothing."""
    results = Results(run=circumstances)
    found = {"scores": np.arange(20.0), "same": np.arange(20) < 9, "thresholds": np.ones(2)}
    for fnet in ("a:b", "a/b"):
        cell = Cell("verification", fnet, "bicubic", 7, 6)
        results.add(cell, {"accuracy": estimate([0.5, 0.6])}, found)
    cell = Cell("verification", fnet, "nothing to draw", 7, 6)
    results.add(cell, {"accuracy": estimate([0.5])}, {"scores": np.ones(20), "cmc": np.ones(0)})
    files = write_figures(results, tmp_path)
    assert len(files) == len(set(files)) == len([*tmp_path.iterdir()]) == 10


def drawn_bars(axes):
    return {bars.get_label(): bars for bars in axes.containers}


def test_accuracy_figure_shows_the_figures(run):
    figure = accuracy_figure(run, "verification", STYLES)
    assert len(figure.axes) == 2
    first = figure.axes[0]
    ticks = [label.get_text() for label in first.get_xticklabels()]
    assert ticks == [f"{h}\N{MULTIPLICATION SIGN}{w}" for h, w in SIZES]
    places = []
    for name, bars in drawn_bars(first).items():
        cells = [Cell("verification", "sface", name, *size) for size in SIZES]
        expected = [100 * run.value(cell, "accuracy") for cell in cells]
        np.testing.assert_allclose(bars.lines[0].get_ydata(), expected)
        places.append(bars.lines[0].get_xdata()[0])
        ends = np.concatenate([segment[:, 1] for segment in bars.lines[2][0].get_segments()])
        assert 0 <= ends.min() <= ends.max() <= 100  # no bar is longer than a share can be
    assert len(set(places)) == len(METHODS)  # side by side
    assert "%" in first.get_ylabel()
    assert "pixels" in first.get_xlabel()


def test_methods_look_the_same_in_every_figure(run, scores):
    assert method_styles([LONG, *METHODS[::-1]]) == STYLES
    assert len({(style["color"], style["linestyle"]) for style in STYLES.values()}) == len(STYLES)
    curves = rocs(scores, METHODS)
    lines = roc_figure(curves, "", STYLES).axes[0].lines
    bars = drawn_bars(accuracy_figure(run, "verification", STYLES).axes[0])
    for (name, curve), line in zip(curves.items(), lines, strict=True):
        assert line.get_label().startswith(name)
        assert line.get_color() == bars[name].lines[0].get_color() == STYLES[name]["color"]
        np.testing.assert_allclose(line.get_ydata(), 100 * curve.tar)
        shown = curve.far > 1e-4
        np.testing.assert_allclose(line.get_xdata()[shown], curve.far[shown])


@pytest.mark.parametrize(
    "simulation",
    [
        "0.152286 1.052583 -0.204868 0.114503 0.786281 0.099216 -0.003882 -0.048116 1.051998",
        "0.367322 0.860646 -0.227968 0.280085 0.672501 0.047413 -0.011820 0.042940 0.968881",
    ],
    ids=["protanopia", "deuteranopia"],
)
def test_colours_stay_apart_for_the_colour_blind(simulation):
    """Machado, Oliveira and Fernandes (2009), severity 1.0."""
    matrix = np.array(simulation.split(), dtype=float).reshape(3, 3)
    colours = {style["color"] for style in method_styles(METHODS).values()}
    linear = np.array([to_rgb(colour) for colour in colours]) ** 2.2
    seen = np.clip(linear @ matrix.T, 0, 1) ** (1 / 2.2)
    apart = np.linalg.norm(seen[:, None] - seen, axis=-1)
    assert apart[~np.eye(len(seen), dtype=bool)].min() > 0.15


def test_picture_sheet_marks_the_best_of_each_row():
    figure = sheet()
    labels = [axes.xaxis.label for axes in figure.axes]
    bold = [label.get_text() for label in labels if label.get_fontweight() == "bold"]
    assert bold == ["0.500", "0.900", "0.700"]
    picture = figure.axes[3].images[0].get_array()
    assert picture.shape == (112, 96, 3)
    assert figure.axes[0].images[0].get_array().shape == (14, 12, 3)
    for columns in ({"lr": torch.rand(2, 3, 4, 4), HR: torch.rand(3, 3, 4, 4)}, {}):
        with pytest.raises(ValueError, match="columns must hold one number of faces each"):
            picture_sheet(columns)


def test_headings_are_not_broken_within_a_number():
    columns = {"EDSR lambda 0.5": torch.rand(1, 3, 4, 4), HR: torch.rand(1, 3, 4, 4)}
    assert picture_sheet(columns).axes[0].get_title() == "EDSR lambda \n0.5"


def test_matplotlib_is_imported_only_when_a_figure_is_drawn(monkeypatch, scores):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    spec = importlib.util.spec_from_file_location("fresh_figures", figures_module.__file__)
    fresh = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fresh_figures", fresh)
    spec.loader.exec_module(fresh)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'idloss\[eval\]'"):
        fresh.roc_figure(rocs(scores, METHODS), "", STYLES)
