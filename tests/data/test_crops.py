"""From photos to crops, against the golden crops, OpenCV and single alignment."""

import io
import pickle
from dataclasses import replace
from functools import partial

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from idloss.data import DataError, FileFaces, align_all, open_faces
from idloss.data.files import MemoryFiles, TarFiles
from idloss.geometry import fit_similarity, get_template


def photos(sizes, seed=0):
    """Smooth random photos with five points somewhere inside each."""
    rng = np.random.default_rng(seed)
    contents, points = {}, []
    template = np.array(get_template("sphereface").points)
    for i, (width, height) in enumerate(sizes):
        small = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "PNG")
        contents[f"{i}.png"] = buffer.getvalue()
        scale = 0.6 * min(width / 96, height / 112)
        noise = rng.normal(0, 0.5, (5, 2))
        points.append((template + noise) * scale + [0.15 * width, 0.1 * height])
    names = tuple(contents)
    return FileFaces(
        MemoryFiles("memory", contents), names, names, landmarks=torch.tensor(np.array(points))
    )


def test_golden_crops(golden, shared):
    names = tuple(map(str, golden["names"]))
    source = FileFaces(
        TarFiles(shared("data/lfw.tar")),
        tuple(f"lfw/{name}" for name in names),
        names,
        landmarks=torch.tensor(golden["landmarks"]),
    )
    crops = align_all(source, progress=False).crops
    theirs = torch.tensor(golden["aligned_bgr"]).permute(0, 3, 1, 2).flip(1)
    difference = (crops.int() - theirs.int()).abs()
    assert difference.max() <= 2
    assert difference.double().mean(dim=(1, 2, 3)).max() < 0.15


def test_photos_of_all_sizes_meet_opencv():
    source = photos([(150, 200), (90, 80), (640, 480), (60, 70), (151, 152)])
    crops = align_all(source, progress=False).crops
    matrices = fit_similarity(source.landmarks).numpy()
    for index, crop in enumerate(crops):
        image = source.read(index).permute(1, 2, 0).numpy()
        theirs = cv2.warpAffine(image, matrices[index], (96, 112), flags=cv2.INTER_CUBIC)
        difference = np.abs(crop.permute(1, 2, 0).numpy().astype(int) - theirs)
        # photos end inside some crops: at that hard edge OpenCV's 1/32 pixel shows most
        assert difference.mean() < 0.3, index
        assert np.quantile(difference, 0.99) <= 2, index


def test_results_do_not_depend_on_the_company():
    source = photos([(150, 200), (90, 80), (640, 480), (60, 70), (151, 152), (75, 300)])
    together = align_all(source, "arcface", threads=3, progress=False)
    for index in range(len(source)):
        (crop,) = source.crops_at([index], "arcface")
        assert (crop.int() - together.crops[index].int()).abs().max() <= 1
    assert together.crop == "arcface"
    assert together.labels is None
    assert together[2][1] == -1


def test_bad_photos_are_named_and_fatal_unless_skipped():
    source = photos([(100, 120)] * 6)
    contents = {name: source.files.read(name) for name in source.members}
    contents["1.png"] = contents["1.png"][:200]
    points = source.landmarks.clone()
    points[3] = torch.nan
    points[4] += 4000
    labels, identities = torch.tensor([0, 1, 0, 2, 0, 1]), ("a", "b", "c")
    source = FileFaces(
        MemoryFiles("memory", contents), source.members, source.names, labels, identities, points
    )
    with pytest.raises(DataError, match=r"3 faults") as caught:
        align_all(source, progress=False)
    message = str(caught.value)
    assert "memory:1.png: unreadable image" in message
    assert "3.png" in message
    assert "4.png: the landmarks lie outside the 100x120 photo" in message
    with pytest.warns(UserWarning, match="left out: 3 faults"):
        aligned = align_all(source, skip_missing=True, progress=False)
    assert aligned.names == ("0.png", "2.png", "5.png")
    assert aligned.identities == ("a", "b")
    assert aligned.labels.tolist() == [0, 0, 1]
    assert len(aligned.skipped) == 3


def test_photos_without_points_cannot_be_aligned():
    source = photos([(100, 120)])
    source = FileFaces(source.files, source.members, source.names)
    with pytest.raises(DataError, match=r"0\.png: there are no landmarks"):
        align_all(source, progress=False)


def test_aligned_crops_are_converted_not_warped_again():
    source = photos([(100, 120)] * 3)
    wide = align_all(source, "arcface", progress=False)
    narrow = align_all(wide, "sphereface", progress=False)
    assert torch.equal(narrow.crops, wide.crops[..., 8:104])
    assert torch.equal(align_all(wide, "arcface", progress=False).crops, wide.crops)


def test_selecting_renumbers_the_identities():
    aligned = align_all(photos([(100, 120)] * 4), progress=False)
    labelled = type(aligned)(
        aligned.crops, aligned.names, torch.tensor([2, 0, -1, 1]), ("x", "y", "z"), "sphereface"
    )
    chosen = labelled.select(torch.tensor([True, False, True, True]))
    assert chosen.labels.tolist() == [1, -1, 0]
    assert chosen.identities == ("y", "z")
    assert torch.equal(chosen.crops, labelled.crops[[0, 2, 3]])


def test_real_faces_through_loader_workers(shared):
    source = open_faces(shared("data/celeba_wild.tar"))
    assert len(source) == 5524
    assert len(source.identities) == 298
    some = source.select(torch.arange(0, 5524, 90))
    whole = align_all(some, progress=False)
    batches = torch.arange(len(some)).split(16)
    loader = DataLoader(batches, batch_size=None, num_workers=2, collate_fn=partial(_cut, some))
    assert (torch.cat([*loader]).int() - whole.crops.int()).abs().max() <= 1
    assert torch.equal(some.labels, whole.labels)
    assert some.names == whole.names


def _cut(faces, indices):
    return faces.crops_at(indices, "sphereface")


class _Worker(torch.utils.data.Dataset):
    def __init__(self, faces):
        self.faces = faces

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.faces.crops_at(range(len(self.faces)), "sphereface")


def test_errors_from_loader_workers_keep_their_shape():
    source = photos([(100, 120)] * 3)
    contents = dict.fromkeys(source.members, b"damaged")
    broken = replace(source, files=MemoryFiles("memory", contents))
    with pytest.raises(DataError) as here:
        broken.crops_at([0, 1, 2], "sphereface")
    with pytest.raises(DataError) as there:
        next(iter(DataLoader(_Worker(broken), batch_size=None, num_workers=1)))
    assert str(there.value) == str(here.value)
    assert str(there.value).startswith("3 faults:\n  memory:0.png: unreadable image")
    assert str(pickle.loads(pickle.dumps(there.value))) == str(there.value)


def test_faults_go_where_they_are_asked_for():
    source = photos([(100, 120)] * 3)
    contents = {name: source.files.read(name) for name in source.members} | {"1.png": b""}
    broken = replace(source, files=MemoryFiles("memory", contents))
    faults = {}
    crops = broken.crops_at([0, 1, 2], "arcface", faults=faults)
    assert [*faults] == [1]
    assert crops[1].max() == 0
    assert torch.equal(crops[:1], source.crops_at([0], "arcface"))


@pytest.mark.parametrize("size", [112, 128, 160])
def test_crops_of_other_sizes_meet_the_template(size):
    picture = io.BytesIO()
    Image.new("RGB", (size, size), (10, 20, 30)).save(picture, "PNG")
    files = MemoryFiles("lfw.bin", {"0": picture.getvalue()})
    faces = FileFaces(files, ("0",), ("0",), crop="arcface")
    assert faces.crops_at([0]).shape == (1, 3, 112, 112)
    assert faces.crops_at([0], "sphereface").shape == (1, 3, 112, 96)
    with pytest.raises(DataError, match="a sphereface crop is 112x96"):
        replace(faces, crop="sphereface").crops_at([0])
