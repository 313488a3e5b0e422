import os
import random
from hashlib import sha256

import numpy as np
import pytest
import torch
from nets import TinySRNet, tiny_fnet
from PIL import Image

from idloss import create_fnet
from idloss.detection import Detections
from idloss.gallery import Gallery
from idloss.geometry import get_template
from idloss.matching import FaceMatcher

POINTS = torch.tensor(get_template("sphereface").points)


class Finder:
    """Finds one face in a square photo, two in a wide one, none in a tall one; counts photos."""

    def __init__(self):
        self.seen = 0

    def __call__(self, photos):
        self.seen += len(photos)
        return [self.faces(*photo.shape[-2:]) for photo in photos]

    def __repr__(self):
        return "finder"

    def faces(self, height, width):
        count = 2 if width > height else int(width == height)
        points = torch.stack([POINTS * 0.5 + 5, POINTS * 0.5 + torch.tensor([60.0, 5])])[:count]
        boxes = torch.cat((points.amin(1), points.amax(1)), 1)
        return Detections(boxes, torch.ones(count), points)


@pytest.fixture(scope="module")
def matcher():
    torch.manual_seed(0)
    nets = TinySRNet().eval(), create_fnet(tiny_fnet(size=(112, 96)))
    return FaceMatcher(*nets, Finder(), device="cpu")


def draw(folder, name, seed, shape=(70, 70)):
    pixels = np.random.default_rng(seed).integers(0, 255, (7, 7, 3), np.uint8)
    folder.mkdir(exist_ok=True)
    Image.fromarray(pixels).resize(shape[::-1]).save(folder / name)
    return folder / name


def update(gallery, folder):
    faults = []
    before = gallery.matcher.detector.seen
    gallery.update(sorted(folder.glob("*.png")), faults)
    return faults, gallery.matcher.detector.seen - before


def check(gallery, folder):
    """Whether it holds what a look at each photo gives, each row where its index says."""
    expected = {
        (path, face.box): face.embedding
        for path in folder.glob("*.png")
        for face in gallery.matcher.read(path)
    }
    assert len(gallery) == len(expected)
    stored = np.load(gallery.folder / "embeddings.npy", mmap_mode="r")
    np.testing.assert_array_equal(stored, gallery.rows())
    assert np.allclose(np.linalg.norm(stored, axis=1), 1, atol=1e-5)
    hits = [gallery._hit(place, stored) for place in range(len(gallery))]
    assert {(hit.photo, hit.face.box) for hit in hits} == expected.keys()
    for hit in hits:
        wanted = expected[hit.photo, hit.face.box]
        torch.testing.assert_close(hit.face.embedding, wanted, atol=1e-5, rtol=0)


def test_a_face_is_found_in_its_photo(matcher, tmp_path):
    for seed in range(11):
        draw(tmp_path / "photos", f"{seed}.png", seed, (70, 140) if seed == 4 else (70, 70))
    with Gallery(tmp_path / "index", matcher) as gallery:
        assert update(gallery, tmp_path / "photos") == ([], 11)
        assert len(gallery) == 12
        (probe,) = matcher.read(tmp_path / "photos" / "7.png")
        (hits,) = gallery.search([probe], 3)
        assert hits[0].photo == tmp_path / "photos" / "7.png"
        assert hits[0].face.rows == pytest.approx(probe.rows)
        cosines = [matcher.compare(probe, hit.face)[0] for hit in hits]
        assert cosines == sorted(cosines, reverse=True)
        assert cosines[0] == pytest.approx(1)
        assert [len(own) for own in gallery.search([probe, probe], 40)] == [12, 12]
        check(gallery, tmp_path / "photos")


def test_only_what_is_new_or_changed_is_embedded(matcher, tmp_path):
    photos = tmp_path / "photos"
    for seed in range(5):
        draw(photos, f"{seed}.png", seed)
    (photos / "broken.png").write_bytes(b"no picture")
    draw(photos, "nobody.png", 9, (140, 70))
    os.mkfifo(photos / "pipe.png")
    with Gallery(tmp_path / "index", matcher) as gallery:
        faults, seen = update(gallery, photos)
        assert {fault.where for fault in faults} == {
            str(photos / name) for name in ("broken.png", "pipe.png")
        }
        assert seen == 6
    os.utime(photos / "1.png", (1, 1))  # touched, with what it held
    draw(photos, "2.png", 22, (70, 140))
    (photos / "0.png").unlink()
    (photos / "broken.png").unlink()
    (photos / "pipe.png").unlink()
    with Gallery(tmp_path / "index", matcher) as gallery:
        assert update(gallery, photos) == ([], 1)
        check(gallery, photos)
        assert update(gallery, photos) == ([], 0)
        # a photo that is damaged now is in the gallery no more
        (photos / "2.png").write_bytes(b"no picture")
        assert len(update(gallery, photos)[0]) == 1
        assert len(gallery) == 3


def test_whatever_is_done_to_photos_and_wherever_it_stops(matcher, tmp_path, monkeypatch):
    """Photos come, change and go, updates are cut off at any write: afterwards all is right."""
    photos, draws = tmp_path / "photos", random.Random(0)
    write, left, made = Gallery._write, [0], {}

    def cut_off(self, first, rows):
        left[0] -= 1
        write(self, first, rows)
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Gallery, "_write", cut_off)
    for round_ in range(12):
        for name in draws.sample(range(30), 8):
            path = photos / f"{name}.png"
            if path.exists() and draws.random() < 0.6:
                path.unlink()
            else:
                shape = draws.choice([(70, 70), (70, 140), (140, 70)])
                draw(photos, path.name, 100 * round_ + name, shape)
                for face in matcher.read(path):
                    made[sha256(path.read_bytes()).digest(), face.box[0]] = face.embedding
        left[0] = draws.randrange(1, 9)
        with Gallery(tmp_path / "index", matcher) as gallery:
            try:
                update(gallery, photos)
            except KeyboardInterrupt:
                for path in [*photos.glob("*.png")][:2]:
                    path.unlink()
        # whatever the index says of a row is true, of photos that are gone as well
        with Gallery(tmp_path / "index", matcher) as gallery:
            rows = np.fromfile(gallery.folder / "embeddings.npy", "<f4", offset=gallery._head)
            rows = torch.from_numpy(rows.reshape(-1, matcher.num_features))
            told = "SELECT row, hash, x0 FROM faces JOIN photos ON photo = id"
            for row, content, left in gallery._index.execute(told):
                torch.testing.assert_close(rows[row], made[content, left], atol=1e-5, rtol=0)
    left[0] = 0
    with Gallery(tmp_path / "index", matcher) as gallery:
        update(gallery, photos)
        check(gallery, photos)


@pytest.mark.parametrize("harm", ["gone", "changed"])
def test_rows_are_written_over_only_when_nobody_owns_them(matcher, tmp_path, monkeypatch, harm):
    """A row of a photo that is gone, or was changed, is still its own if the update is cut off."""
    first, _ = (draw(tmp_path / "photos", f"{name}.png", name) for name in (1, 2))
    with Gallery(tmp_path / "index", matcher) as gallery:
        update(gallery, tmp_path / "photos")
        before = gallery.rows().copy()
    first.unlink() if harm == "gone" else draw(tmp_path / "photos", "2.png", 3)
    write = Gallery._write

    def cut_off(self, place, rows):
        write(self, place, rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(Gallery, "_write", cut_off)
    with Gallery(tmp_path / "index", matcher) as gallery, pytest.raises(KeyboardInterrupt):
        update(gallery, tmp_path / "photos")
    with Gallery(tmp_path / "index", matcher) as gallery:
        places = [row for (row,) in gallery._index.execute("SELECT row FROM faces")]
        stored = np.fromfile(gallery.folder / "embeddings.npy", "<f4", offset=gallery._head)
        stored = stored.reshape(-1, matcher.num_features)
        assert places
        np.testing.assert_array_equal(stored[places], before[places])


def test_other_settings_and_damage(matcher, tmp_path):
    Gallery(tmp_path, matcher).close()
    other = FaceMatcher("bicubic", matcher.fnet, matcher.detector, device="cpu")
    with pytest.raises(ValueError, match="holds embeddings of other networks"):
        Gallery(tmp_path, other)
    with Gallery(tmp_path, matcher) as gallery:
        (none,) = gallery.search(matcher.find([torch.zeros(3, 70, 70, dtype=torch.uint8)])[0])
        assert none == []
    (tmp_path / "index.sqlite").write_bytes(b"no index at all" * 100)
    with pytest.raises(ValueError, match="holds no gallery, or a damaged one"):
        Gallery(tmp_path, matcher)


def test_names_that_are_no_text(matcher, tmp_path):
    folder = tmp_path / "photos"
    odd = os.fsencode(folder) + b"/\xff\n.png"
    draw(folder, "a.png", 1).rename(os.fsdecode(odd))
    with Gallery(tmp_path / "index", matcher) as gallery:
        assert update(gallery, folder) == ([], 1)
        ((hit,),) = gallery.search(matcher.read(os.fsdecode(odd)))
        assert os.fsencode(hit.photo) == odd
