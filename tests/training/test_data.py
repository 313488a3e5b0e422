"""Crops and HR features: from wherever they come, the same."""

import numpy as np
import pytest
import torch
from minilfw import mini_lfw
from nets import TinyFNet, tiny_fnet
from tinytraining import losses, tiny_faces, tiny_run

from idloss import IdentityPreservedLoss
from idloss.data import DataError, Fault, align_all, lfw, prepare
from idloss.resample import to_float
from idloss.training import Recipe
from idloss.training.batches import (
    Crops,
    Draw,
    compute_features,
    features_key,
    stored_features,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return lfw(mini_lfw(tmp_path_factory.mktemp("lfw"), people=4, photos=3)).faces


@pytest.fixture(scope="module")
def prepared(photos, tmp_path_factory):
    return prepare(photos, tmp_path_factory.mktemp("prepared"), progress=False).faces


def draws(count, steps=3, size=4):
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        faces = torch.randint(count, (size,), generator=generator)
        yield Draw(step, faces, slice(0, size), size)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("held", ["photos", "prepared", "in memory", "on the device"])
def test_crops_are_those_of_the_aligner(photos, prepared, held, workers):
    expected = align_all(photos, progress=False).crops
    faces = {"photos": photos, "prepared": prepared, "in memory": align_all(prepared)}
    hold = "device" if held == "on the device" else "auto"
    recipe = Recipe(hold_crops=hold, workers=workers)
    crops = Crops(faces.get(held, prepared), recipe, CPU)
    assert (crops.resident is not None) == (held == "on the device")
    wanted = list(draws(len(photos)))
    found = list(crops.read(iter(wanted)))
    assert [draw.step for draw, _ in found] == [1, 2, 3]
    for draw, pixels in found:
        assert pixels.dtype == torch.uint8
        # batches of photos are warped together: sums in another order, a level at most
        difference = (pixels.int() - expected[draw.faces].int()).abs()
        assert difference.max() <= (1 if held == "photos" else 0)


def test_photos_cannot_stay_on_the_device(photos):
    with pytest.raises(ValueError, match="needs prepared faces: run 'idloss prepare'"):
        Crops(photos, Recipe(hold_crops="device"), CPU)


def test_features_are_those_of_the_crops_and_their_mirror_images():
    faces, identity = tiny_faces(), IdentityPreservedLoss(tiny_fnet(), crop="sphereface")
    features = compute_features(faces, identity, CPU, progress=False)
    assert features.shape == (2, 20, 16)
    hr = to_float(faces.crops)
    torch.testing.assert_close(features[0], identity.embed(hr))
    torch.testing.assert_close(features[1], identity.embed(hr.flip(-1)))


def test_features_are_kept_beside_prepared_faces(prepared, monkeypatch):
    identity = IdentityPreservedLoss(tiny_fnet(), crop="sphereface")
    calls = identity.encoders[0].fnet.calls
    first = stored_features(prepared, identity, CPU, progress=False)
    assert calls
    monkeypatch.setattr("idloss.training.batches.compute_features", None)
    again = stored_features(prepared, identity, CPU, progress=False)
    assert torch.equal(first, again)  # from the disk
    (file,) = prepared.folder.glob("features-*.npy")
    assert np.load(file).shape == (2, len(prepared), 16)


def test_features_that_cannot_be_kept_stay_in_memory(prepared, monkeypatch):
    """A full or read-only disk costs a warning, not the work."""
    identity = IdentityPreservedLoss(tiny_fnet(seed=2), crop="sphereface")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.save", full)
    with pytest.warns(UserWarning, match=r"cannot be kept in .*No space left.*another folder"):
        features = stored_features(prepared, identity, CPU, progress=False)
    assert features.equal(compute_features(prepared, identity, CPU, progress=False))
    assert not list(prepared.folder.glob(f"*{features_key(prepared.content, identity)}*"))


@pytest.mark.parametrize("harm", ["cut", "garbage", "of fewer faces", "another FNet's", "zero"])
def test_features_that_are_not_those_of_today_are_made_anew(prepared, harm):
    identity = IdentityPreservedLoss(tiny_fnet(seed=3), crop="sphereface")
    path = prepared.folder / f"features-{features_key(prepared.content, identity)}.npy"
    expected = compute_features(prepared, identity, CPU, progress=False)
    other = IdentityPreservedLoss(tiny_fnet(seed=4), crop="sphereface")
    found = {
        "of fewer faces": lambda: expected[:, :-1],
        "another FNet's": lambda: compute_features(prepared, other, CPU, progress=False),
        "zero": lambda: expected * 0,
    }
    np.save(path, found.get(harm, lambda: expected)().numpy())
    if harm in ("cut", "garbage"):
        path.write_bytes(path.read_bytes()[:-40] if harm == "cut" else b"hello")
    with pytest.warns(UserWarning, match=r"features-.*npy is damaged .* is made anew"):
        assert stored_features(prepared, identity, CPU, progress=False).equal(expected)
    assert stored_features(prepared, identity, CPU, progress=False).equal(expected)
    path.unlink()


def test_features_of_an_fnet_that_cannot_be_told_from_others_are_not_kept(prepared):
    class Noisy(TinyFNet):
        def forward(self, x):
            return super().forward(x) + torch.randn(1)

    identity = IdentityPreservedLoss(Noisy(), crop="sphereface")
    before = set(prepared.folder.iterdir())
    with pytest.warns(UserWarning, match="serve this run alone: an FNet that cannot be told from"):
        stored_features(prepared, identity, CPU, progress=False)
    assert set(prepared.folder.iterdir()) == before


def test_features_of_other_faces_or_fnets_are_not_taken(prepared):
    identity = IdentityPreservedLoss(tiny_fnet(), crop="sphereface")
    other = IdentityPreservedLoss(tiny_fnet(seed=1), crop="sphereface")
    stretched = IdentityPreservedLoss(tiny_fnet(), crop="sphereface", interpolation="bicubic")
    fewer = prepared.select(torch.arange(len(prepared) - 1))
    bgr = IdentityPreservedLoss(tiny_fnet(), crop="sphereface", channel_order="bgr")
    keys = [features_key(prepared.content, one) for one in (identity, other, stretched, bgr)]
    keys.append(features_key(fewer.content, identity))
    assert len(set(keys)) == 5
    assert features_key(prepared.content, identity) == keys[0]


def test_a_run_gives_the_same_on_photos_and_prepared(photos, prepared, tmp_path):
    """Photos: HR features live, each photo decoded again; to a level of a pixel."""
    tiny_run(tmp_path / "prepared", faces=prepared, iterations=3)
    tiny_run(tmp_path / "photos", faces=photos, iterations=3)
    one, other = losses(tmp_path / "prepared"), losses(tmp_path / "photos")
    np.testing.assert_allclose(list(one.values()), list(other.values()), atol=1e-3)
    assert not list((tmp_path / "photos").rglob("features-*"))


# faces that fail in mid-run


@pytest.mark.parametrize("workers", [0, 1])
def test_a_photo_that_breaks_names_itself_or_is_replaced(tmp_path, workers):
    root = mini_lfw(tmp_path / "lfw", people=4, photos=3)
    faces = lfw(root).faces
    broken = sorted(root.rglob("*.jpg"))[4]
    broken.write_bytes(broken.read_bytes()[:200])
    fields = {"iterations": 2, "batch_size": 8, "workers": workers, "identity_weight": 0}
    with pytest.raises(DataError) as caught:
        tiny_run(tmp_path / "strict", faces=faces, **fields)
    assert broken.stem in str(caught.value)
    assert "set skip_missing=true" in str(caught.value)
    assert len(caught.value.faults) == 1
    if workers:
        return  # what follows is the main process's
    with pytest.warns(UserWarning, match=f"replaced by the next faces: .*{broken.stem}"):
        tiny_run(tmp_path / "lenient", faces=faces, skip_missing=True, **fields)


def test_the_label_of_a_replaced_face_goes_with_it(tmp_path, monkeypatch):
    faces = tiny_faces(8)
    crops = Crops(faces, Recipe(skip_missing=True), CPU)
    read = type(crops.faces).crops_at

    def failing(self, indices, crop=None, *, faults=None):
        found = read(self, indices, crop, faults=faults)
        for row, face in enumerate(torch.as_tensor(indices).tolist()):
            if face in (2, 3) and faults is not None:
                faults[face] = Fault(f"face {face}", "gone")
                found[row] = 0
        return found

    monkeypatch.setattr(type(crops.faces), "crops_at", failing)
    with pytest.warns(UserWarning, match="face 2: gone"):
        [(draw, pixels)] = crops.read([Draw(1, torch.tensor([0, 2]), slice(0, 2), 2)])
    assert draw.faces.tolist() == [0, 4]
    assert pixels[1].equal(faces.crops[4])
