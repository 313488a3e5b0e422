import pytest
import torch
from nets import TinySRNet, tiny_fnet
from PIL import Image

from idloss import FaceEncoder, FacePipeline, create_detector, create_srnet, weights
from idloss.data.faces import decode_image
from idloss.data.files import DataError, open_files
from idloss.detection import Detections
from idloss.geometry import Template, align, get_template
from idloss.pipeline import cut_face
from idloss.resample import resize

TEMPLATE = torch.tensor(get_template("sphereface").points)


def photo(height=300, width=260):
    """Smooth and nowhere alike."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([(x / 40).sin(), (y / 30).cos(), ((x + y) / 50).sin()]) * 0.4 + 0.5


class Pointing:
    """A detector that says what it is told, of every photo."""

    def __init__(self, *faces):
        self.points = torch.stack(faces) if faces else torch.zeros(0, 5, 2)

    def __call__(self, images):
        boxes = (
            torch.cat((self.points.amin(1), self.points.amax(1)), 1)
            if len(self.points)
            else (torch.zeros(0, 4))
        )
        return [Detections(boxes, torch.ones(len(boxes)), self.points) for _ in images]


class Enlarging(TinySRNet):
    scale = 2


def pipeline(*faces, **options):
    return FacePipeline(Pointing(*faces), Enlarging(), tiny_fnet(), device="cpu", **options)


@pytest.mark.parametrize(
    ("zoom", "size"),
    [(1.0, (112, 96)), (0.6, (112, 96)), (0.49, (56, 48)), (0.24, (28, 24)), (0.03, (7, 6))],
)
def test_crops_have_the_pixels_of_the_face(zoom, size):
    image, points = photo(), TEMPLATE * zoom + 40
    crop = cut_face(image, points, "sphereface")
    assert crop.shape == (3, *size)
    whole = align(image[None], points[None], "sphereface")
    shrunk = resize(whole, size, convention="antialias")[0]
    torch.testing.assert_close(crop, shrunk, atol=0.01, rtol=0)


def test_large_faces_are_antialiased():
    fine = torch.rand(1, 3, 600, 500, generator=torch.Generator().manual_seed(0))
    plain = align(fine, (TEMPLATE * 5)[None])[0]
    crop = cut_face(fine[0], TEMPLATE * 5, "sphereface")
    assert crop.std() < 0.4 * plain.std()
    smooth = photo(600, 500)
    wanted = align(smooth[None], (TEMPLATE * 5 + 2)[None])[0]
    inner = (slice(None), slice(2, -2), slice(2, -2))
    crop = cut_face(smooth, TEMPLATE * 5 + 2, "sphereface")
    torch.testing.assert_close(crop[inner], wanted[inner], atol=0.02, rtol=0)


def test_from_photo_to_picture_and_embedding():
    faces = [TEMPLATE * zoom + place for zoom, place in ((1.1, 20), (0.2, 150), (0.15, 200))]
    run = pipeline(*faces)
    one, other = run([photo(), (photo() * 255).byte()])
    assert [crop.shape[1] for crop in one.crops] == [112, 28, 28]
    assert one.pictures.shape == (3, 3, 448, 384)
    assert one.embeddings.shape == (3, 16)
    torch.testing.assert_close(one.embeddings, other.embeddings, atol=0.05, rtol=0)
    crop = cut_face(photo(), faces[0], "sphereface")[None]
    torch.testing.assert_close(one.embeddings[0], run.encoder(crop)[0])
    small = run.srnet(cut_face(photo(), faces[2], "sphereface")[None])
    torch.testing.assert_close(one.embeddings[2], run.encoder(small)[0])
    assert pipeline(*faces, size=(56, 48))(photo())[0].pictures.shape == (3, 3, 56, 48)


def test_faces_with_pixels_enough_are_as_the_photo_has_them():
    """A network trained to give 112x96 from 28x24 spoils faces that have more than it can give."""
    image = photo(900, 800)
    large, small = TEMPLATE * 4 + 1.5, TEMPLATE * 0.25 + 500
    (faces,) = pipeline(large, small)(image)
    assert faces.restored == (False, True)
    wanted = align(image[None], large[None], Template("large", (448, 384), large.tolist()))
    assert (faces.pictures[0] / 255 - wanted[0]).abs().max() < 0.01
    (other,) = pipeline(large, size=(56, 48))(image)
    small = resize(wanted, (56, 48), convention="antialias")
    assert (other.pictures[0] / 255 - small[0])[:, 2:-2, 2:-2].abs().max() < 0.01


def test_crops_are_taken_as_they_are():
    run = FacePipeline(None, Enlarging(), tiny_fnet(), device="cpu")
    crops = [photo(*size) for size in ((14, 12), (20, 17), (112, 96), (448, 384))]
    found = run(crops, crop="sphereface")
    assert [one.crops[0].shape[1:] for one in found] == [(14, 12), (20, 17), (112, 96), (112, 96)]
    assert [one.restored[0] for one in found] == [True, True, False, False]
    levels = run.srnet(crops[0][None])
    shown = resize(levels.clamp(0, 1), (448, 384))
    assert (found[0].pictures[0] / 255 - shown[0].clamp(0, 1)).abs().max() < 0.003
    assert (found[3].pictures[0] / 255 - crops[3]).abs().max() < 0.003
    eye = found[0].found.landmarks[0, 0]
    assert eye.tolist() == pytest.approx([(x + 0.5) / 8 - 0.5 for x in TEMPLATE[0].tolist()])
    (other,) = run(photo(28, 28), crop="arcface")  # 8 px of 112 wider
    assert other.crops[0].shape == (3, 28, 24)
    with pytest.raises(ValueError, match="a 'sphereface' crop is 112x96 or of the same aspect"):
        run(photo(30, 30), crop="sphereface")
    with pytest.raises(ValueError, match="without a detector"):
        run(photo())


def test_pasted_faces_lie_where_they_were():
    image = photo(120, 100)
    turned = torch.tensor([[0.98, -0.2], [0.2, 0.98]])
    faces = [TEMPLATE * 0.24 @ turned.T + torch.tensor([30.0, 20.0]), TEMPLATE * 0.2 + 85]
    run = FacePipeline(Pointing(*faces), "bicubic", None, device="cpu")
    levels = (image * 255).byte()
    pasted = run.paste(levels, run(levels)[0])
    assert pasted.shape == (3, 480, 400)
    plain = resize(levels[None], (480, 400))[0]
    apart = (pasted.float() - plain.float()).abs()
    assert apart.amax() < 6  # smooth, and pasted where it was, though the second face reaches out
    assert apart[:, :40].amax() == 0
    marked = run(levels)[0]
    marked.pictures[0] = 255
    apart = (run.paste(levels, marked).float() - plain.float()).amin(0)
    y, x = (4 * faces[0].mean(0) + 1.5).round().int().tolist()[::-1]
    assert apart[y, x] == (255 - plain.float()[:, y, x]).amin()
    rows = apart[:, x]
    assert rows.diff().abs().amax() < 20  # no hard border


def test_no_face_and_what_is_no_face():
    (nothing,) = pipeline()(photo())
    assert len(nothing) == 0
    assert nothing.embeddings.shape == (0, 16)
    line = torch.stack([torch.arange(5.0), torch.arange(5.0)], 1) * 9
    (kept,) = pipeline(line, TEMPLATE + 30)(photo())
    assert len(kept) == len(kept.found) == 1
    assert "lie on one line" in kept.left_out[0]


def test_files(tmp_path):
    """Grey, alpha, turned by its EXIF; 16 bits and damaged ones are refused by name."""
    pixels = (photo() * 255).byte().permute(1, 2, 0).numpy()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(pixels).convert("RGBA").save(tmp_path / "alpha.png")
    run = pipeline(TEMPLATE + 30)
    turned, grey, alpha, plain = run(
        [*(tmp_path / f"{name}.png" for name in ("turned", "grey", "alpha")), photo()]
    )
    sideways = photo().flip(1).transpose(1, 2)
    torch.testing.assert_close(turned.crops, run(sideways)[0].crops, atol=1, rtol=0)
    torch.testing.assert_close(alpha.crops, plain.crops, atol=1, rtol=0)
    assert (grey.crops[0][0] == grey.crops[0][2]).all()
    Image.fromarray(pixels[..., 0].astype("uint16")).save(tmp_path / "deep.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "grey.png").read_bytes()[:300])
    for name, said in (("deep", "expected 8 bits"), ("cut", "unreadable"), ("gone", "No such")):
        with pytest.raises(DataError, match=rf"{name}\.png: {said}"):
            run(tmp_path / f"{name}.png")


def test_real_photos(shared, tmp_path):
    for part in ("pnet", "rnet", "onet"):
        path = shared(f"weights/mtcnn/{part}.pt")
        weights.add(f"mtcnn_{part}.widerface", path, cache_dir=tmp_path)
    files, name = open_files(shared("data/lfw.tar")), "lfw/Aaron_Peirsol/Aaron_Peirsol_0001.jpg"
    image = resize(decode_image(files.read(name), name), (56, 56), convention="antialias")
    detector = create_detector("mtcnn", cache_dir=tmp_path)
    (faces,) = FacePipeline(detector, "edsr16_64_id", tiny_fnet(), device="cpu")(image)
    assert [crop.shape for crop in faces.crops] == [(3, 28, 24)]
    assert faces.pictures.float().std() > 30


def test_an_encoder_that_is_shown_something_else_is_refused():
    """It was used as it is, and embedded what it was not made for."""
    fnet = tiny_fnet(size=(112, 112))
    fnet.crop = "arcface"
    for encoder in (
        FaceEncoder(fnet),
        FaceEncoder(tiny_fnet(), crop="arcface"),
        FaceEncoder(tiny_fnet(), value_range=(-1, 1)),
        FaceEncoder(tiny_fnet(), channel_order="bgr"),
    ):
        with pytest.raises(ValueError, match=r"is shown crop=sphereface in .*: make it with these"):
            FacePipeline(None, Enlarging(), encoder, device="cpu")
    FacePipeline(None, Enlarging(), FaceEncoder(fnet, crop="sphereface"), device="cpu")


def test_crops_narrower_than_the_srnets_are_told():
    wide = FacePipeline(None, create_srnet("bicubic", crop="ffhq"), None, device="cpu")
    with pytest.warns(UserWarning, match="crops of arcface hold 56% of ffhq"):
        wide(torch.rand(3, 112, 112), crop="arcface")
