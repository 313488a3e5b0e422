import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from nets import faces, tiny_fnet

from idloss import FaceEncoder, IdentitySimilarity, identity_similarity
from idloss.geometry import convert_crop
from idloss.metrics import grid_ratio
from idloss.resample import resize


def sets(batch=5, size=(28, 24)):
    return faces(batch, size, seed=1), faces(batch, size, seed=2)


def test_values_are_cosines_of_embeddings_however_they_are_batched():
    restored, reference = sets()
    encoder = FaceEncoder(tiny_fnet(), crop="sphereface", interpolation="bicubic")
    expected = F.cosine_similarity(encoder(restored), encoder(reference))
    ids = IdentitySimilarity(tiny_fnet(), crop="sphereface")
    first = ids(restored[:3], reference[:3])
    ids.update(restored[3:], reference[3:])
    torch.testing.assert_close(first, expected[:3])
    torch.testing.assert_close(ids.values, expected)
    torch.testing.assert_close(ids.compute(), expected.mean())
    torch.testing.assert_close(ids.deviation(), expected.std(correction=0))
    whole = identity_similarity(restored, reference, fnet=tiny_fnet(), crop="sphereface")
    torch.testing.assert_close(whole, expected)
    ids.reset()
    ids.update(reference, reference)
    torch.testing.assert_close(ids.values, torch.ones(5))


def test_whole_pictures_are_seen_in_the_crop_that_is_named():
    """CodeFormer#313: the face that the FNet was trained on is cut out of a whole picture."""
    restored, reference = sets(3, (64, 64))
    cut = [F.interpolate(one, (512, 512)) for one in (restored, reference)]
    cropped = [convert_crop(one, "ffhq", "sphereface").clamp(0, 1) for one in cut]
    named = identity_similarity(*cut, fnet=tiny_fnet(), crop="ffhq")
    by_hand = identity_similarity(*cropped, fnet=tiny_fnet(), crop="sphereface")
    torch.testing.assert_close(named, by_hand, atol=2e-3, rtol=0)  # clamped
    with pytest.warns(UserWarning, match="stretched"):
        squeezed = identity_similarity(*cut, fnet=tiny_fnet(), crop=None)
    assert (named - squeezed).abs().max() > 1e-3
    with pytest.raises(TypeError, match="crop"):
        IdentitySimilarity(tiny_fnet())


def test_it_is_a_module_that_trains_and_saves_nothing():
    ids = IdentitySimilarity(tiny_fnet(), crop="sphereface").train().double()
    assert not ids.state_dict()
    assert not [*ids.parameters()]
    restored, reference = (one.double() for one in sets())
    assert not ids(restored.requires_grad_(), reference).requires_grad
    for twin in (copy.deepcopy(ids), pickle.loads(pickle.dumps(ids))):
        assert torch.equal(twin.compute(), ids.compute())


def test_what_does_not_go_in_pairs_is_refused():
    restored, reference = sets()
    ids = IdentitySimilarity(tiny_fnet(), crop="sphereface")
    with pytest.raises(ValueError, match="no picture was taken in"):
        ids.compute()
    with pytest.raises(ValueError, match="go in pairs"):
        ids.update(restored, reference[:3])
    with pytest.raises(ValueError, match="5 restored pictures and 3 references"):
        identity_similarity(restored, reference[:3], fnet=tiny_fnet(), crop="sphereface")
    with pytest.warns(UserWarning, match="255"):
        ids.update(restored, reference * 255)


@pytest.mark.filterwarnings("ignore:.*has points of")
def test_a_real_face_is_itself_and_nobody_else(shared):
    """With an FNet of a published figure; people of LFW are apart, the same crop smaller is not."""
    from idloss.data import lfw

    folder = shared("weights/edgeface_xxs")
    found = lfw(shared("data/lfw.tar"), landmarks=shared("data/lfw_landmarks.csv"), pairs=None)
    crops = found.faces.crops_at(torch.arange(0, 3000, 250), "ffhq").float() / 255
    ids = IdentitySimilarity(f"local-dir:{folder}", crop="ffhq")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids.update(F.interpolate(crops, (256, 256), mode="area"), crops)
    assert ids.values.min() > 0.97
    ids.reset()
    ids.update(crops.roll(1, 0), crops)
    assert ids.values.max() < 0.5


@pytest.mark.filterwarnings("ignore:.*has points of")
def test_ffhq_crops_are_to_an_fnet_what_aligned_photos_are(shared):
    """At 512x512, on 100 real faces; and every pixel of the face has a gradient."""
    from idloss.data import lfw

    folder = shared("weights/edgeface_xxs")
    found = lfw(shared("data/lfw.tar"), landmarks=shared("data/lfw_landmarks.csv"), pairs=None)
    wide, own = (
        FaceEncoder(f"local-dir:{folder}", crop=crop, interpolation="bicubic")
        for crop in ("ffhq", "arcface")
    )
    for places in torch.arange(0, 10_000, 100).split(25):
        large, small = (found.faces.crops_at(places, c).float() / 255 for c in ("ffhq", "arcface"))
        assert large.shape[-2:] == (512, 512)
        with torch.no_grad():
            assert torch.cosine_similarity(wide(large), own(small)).min() > 0.99
    face = large[:2].requires_grad_()
    wide(face).square().sum().backward()
    assert (face.grad[..., 170:420, 160:350] != 0).all()


@pytest.mark.parametrize("period", [2, 4])
@pytest.mark.parametrize("value_range", [(0, 1), (0, 255)])
def test_grid_of_an_up_sampler_stands_out(period, value_range):
    smooth = resize(torch.rand(32, 3, 7, 6, generator=torch.Generator().manual_seed(0)), (28, 24))
    noise = 0.02 * torch.randn(smooth.shape, generator=torch.Generator().manual_seed(1))
    pattern = torch.zeros(28, 24)
    pattern[::period, ::period] = 0.1
    low, high = value_range
    clean, grid = (low + (high - low) * x for x in (smooth + noise, smooth + noise + pattern))
    assert grid_ratio(clean, period) < 2
    assert grid_ratio(grid, period) > 10
    assert grid_ratio(grid.roll((1, 1), (-2, -1)), period) > 10  # wherever it begins


def test_grid_needs_whole_periods():
    with pytest.raises(ValueError, match="30x24 images have no grid of 4 pixels"):
        grid_ratio(torch.rand(1, 3, 30, 24))
