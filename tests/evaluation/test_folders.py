"""IDS of folders: what is matched with what, and what is refused."""

import numpy as np
import pytest
import torch
from nets import tiny_fnet
from PIL import Image

from idloss import identity_similarity
from idloss.data import DataError, draw_faces
from idloss.evaluation import measure_folders
from idloss.resample import to_float

CROPS = draw_faces(4, 1, seed=3, size=(112, 112), crop="arcface").crops


@pytest.fixture
def folders(tmp_path):
    """Four references as PNG; restored ones, the first two in a subfolder, under another ending."""
    for index, crop in enumerate(CROPS):
        restored = np.roll(crop.permute(1, 2, 0).numpy(), index, axis=1)
        name = f"{'a' if index < 2 else 'b'}/{index}"
        for folder, ending, picture in (
            ("references", ".png", crop.permute(1, 2, 0).numpy()),
            ("restored", ".bmp" if index else ".png", restored),
        ):
            path = tmp_path / folder / f"{name}{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.ascontiguousarray(picture)).save(path)
    (tmp_path / "restored" / "notes.txt").write_text("no picture")
    return tmp_path / "restored", tmp_path / "references"


def test_pictures_of_a_name_are_compared(folders):
    metric, values = measure_folders(*folders, fnet=tiny_fnet(), device="cpu")
    assert list(values) == ["a/0.png", "a/1.bmp", "b/2.bmp", "b/3.bmp"]
    rolled = torch.stack([crop.roll(index, -1) for index, crop in enumerate(CROPS)])
    expected = identity_similarity(
        to_float(rolled), to_float(CROPS), fnet=tiny_fnet(), crop="arcface"
    )
    torch.testing.assert_close(torch.tensor([*values.values()]), expected)
    torch.testing.assert_close(metric.compute(), expected.mean())
    assert values["a/0.png"] == pytest.approx(1)


def test_a_missing_counterpart_is_no_silence(folders):
    restored, references = folders
    (references / "a" / "0.png").unlink()
    (restored / "b" / "3.bmp").unlink()
    with pytest.raises(DataError, match=r"(?s)3.png: not restored.*0.png: has no reference"):
        measure_folders(*folders, fnet=tiny_fnet(), device="cpu")
    with pytest.warns(UserWarning, match="left out"):
        _, values = measure_folders(*folders, fnet=tiny_fnet(), device="cpu", skip_missing=True)
    assert list(values) == ["a/1.bmp", "b/2.bmp"]


def test_what_cannot_be_matched_read_or_placed_is_named(folders, tmp_path):
    restored, references = folders

    def refused(match, **options):
        with pytest.raises(ValueError, match=match):
            measure_folders(*folders, fnet=tiny_fnet(), device="cpu", **options)

    (restored / "b" / "2.bmp").write_bytes(b"BM half of a")
    refused(r"b/2.bmp: ")
    with pytest.warns(UserWarning, match="2.bmp"):
        _, values = measure_folders(*folders, fnet=tiny_fnet(), device="cpu", skip_missing=True)
    assert len(values) == 3
    refused("a 'sphereface' crop|a sphereface crop", crop="sphereface")
    (restored / "b" / "2.jpg").write_bytes(b"")
    refused("differs from b/2.bmp by its ending alone")
    Image.new("RGB", (100, 100)).save(references / "a" / "0.png")
    (restored / "b" / "2.jpg").unlink()
    refused("0.png is 100x100, which tells no template")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no pictures of one name are in"):
        measure_folders(tmp_path / "empty", references, fnet=tiny_fnet())
