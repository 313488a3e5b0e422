"""The page, by itself and in a headless Chromium; skips, saying so, where one is missing."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models import save_for_hf

from idloss import create_fnet
from idloss.detection import Detections
from idloss.geometry import get_template

gr = pytest.importorskip("gradio", reason="needs gradio: pip install 'idloss[demo]'")
POINTS = torch.tensor(get_template("sphereface").points)


def seeing(photos):
    """A face in the middle third of each photo, none in a black one."""
    found = []
    for photo in photos:
        count, side = int(photo.any()), photo.shape[-1]
        points = POINTS[None] * side / 288 + side / 3
        boxes = torch.cat((points.amin(1), points.amax(1)), 1)
        found.append(Detections(boxes[:count], torch.ones(count), points[:count]))
    return found


@pytest.fixture(scope="module")
def module(example):
    return example("app")


@pytest.fixture(scope="module")
def page(module, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fnet")
    torch.manual_seed(0)
    save_for_hf(create_fnet("mobilefacenet"), folder)
    return module.Page(f"local-dir:{folder}", seeing)


@pytest.fixture
def photo(tmp_path):
    """`photo(360)` is the file of a photo of so many pixels each way; its face has 112 rows."""

    def draw(side, seed=0):
        pixels = np.random.default_rng(seed).integers(0, 255, (12, 12, 3), np.uint8)
        path = tmp_path / f"{side}-{seed}.png"
        Image.fromarray(pixels).resize((side, side)).save(path)
        return str(path)

    return draw


def shown(figure):
    """Titles and cosines of a sheet."""
    titles = [axes.get_title().replace("\N{MULTIPLICATION SIGN}", "x") for axes in figure.axes]
    return [title.replace("\n", " ") for title in titles], [a.get_xlabel() for a in figure.axes]


def test_a_face_made_small_and_compared(page, photo):
    figure, told = page.show(photo(360), "14x12", None)
    titles, cosines = shown(figure)
    assert titles == [
        "LR 14x12",
        "bilinear",
        "edsr16_64",
        "edsr16_64_id",
        "HR",
    ]
    assert [bool(text) for text in cosines] == [False, True, True, True, False]
    for text, method in zip(cosines[1:4], titles[1:4], strict=True):
        assert f"`{method}` {text}: what that means was not measured" in told
    other, _ = page.show(photo(360), "14x12", photo(360, seed=1))
    assert shown(other)[1] != cosines


def test_a_face_as_it_is(page, module, photo, monkeypatch):
    figure, told = page.show(photo(60), module.AS_IT_IS, None)
    titles, cosines = shown(figure)
    assert titles == ["LR 28x24", "bilinear", "edsr16_64", "edsr16_64_id"]
    assert not any(cosines)
    assert told == module.WARNING
    asked = []
    odds = page.calibration.odds
    record = lambda *given: asked.append(given[2]) or odds(*given)  # noqa: E731
    monkeypatch.setattr(page.calibration, "odds", record)
    figure, _ = page.show(photo(60), module.AS_IT_IS, photo(360))
    assert all(shown(figure)[1][1:4])
    # its own pixels, fewer than those of the crop that it is cut to
    assert asked == [(pytest.approx(112 * 60 / 288), 112)] * 3


def test_what_cannot_be_shown_is_said(page, module, photo, tmp_path):
    black = str(tmp_path / "black.png")
    Image.new("RGB", (90, 90)).save(black)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"none")
    for photos, size, told in (
        ((None, None), "7x6", "Drop a photo first"),
        ((black, None), "7x6", "No face was found"),
        ((str(broken), None), "7x6", "unreadable image"),
        ((photo(60), None), "7x6", "take it as it is"),
        ((photo(60), photo(60)), module.AS_IT_IS, "too few pixels to compare"),
    ):
        with pytest.raises(gr.Error, match=told):
            page.show(photos[0], size, photos[1])


def test_in_a_browser(page, module, photo, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    blocks = module.build(page)
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True)
    try:
        with playwright.sync_playwright() as driver:
            chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
            tab = chromium.new_page()
            tab.set_default_timeout(120_000)
            tab.goto(url)
            tab.locator("input[type=file]").first.set_input_files(photo(360))
            tab.get_by_role("button", name="Fullscreen").first.wait_for()  # it is there
            tab.get_by_label("7x6").check()
            tab.get_by_role("button", name="Show", exact=True).click()
            tab.get_by_text("is no evidence of who somebody is").wait_for()
            assert tab.get_by_text("what that means was not measured").count() == 3
            sheet = tab.get_by_test_id("matplotlib").locator("img")
            assert sheet.evaluate("image => image.decode().then(() => image.naturalWidth)") > 400
            tab.screenshot(path=tmp_path / "page.png", full_page=True)
            chromium.close()
    finally:
        blocks.close()
    assert np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).std() > 10
