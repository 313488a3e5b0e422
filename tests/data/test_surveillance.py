"""TinyFace, QMUL-SurvFace and SCface on miniature trees in their official layout."""

import numpy as np
import pytest
from data.test_faces import NUMBERS, write
from data.test_files import jpeg

from idloss.data import DataError, open_evaluation
from idloss.data.surveillance import (
    scface,
    survface_identification,
    survface_verification,
    tinyface,
)

scipy_io = pytest.importorskip("scipy.io")
FEWER = pytest.mark.filterwarnings("ignore:.*holds 2 images and the published set")


def save(path, **variables):
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy_io.savemat(path, variables, do_compression=True)


def save_list(path, key, names, identities):
    """A list as distributed: a Matlab cell array of texts, one a row, and their people."""
    column = np.empty((len(names), 1), dtype=object)
    column[:, 0] = names
    save(path, **{f"{key}_set": column, f"{key}_ids": np.array(identities)[:, None]})


def images(folder, names):
    return {f"{folder}/{name}": jpeg(size=(20, 16), seed=i) for i, name in enumerate(names)}


@pytest.fixture
def tiny(tmp_path):
    base = tmp_path / "tinyface/Testing_Set"
    gallery, probe = ["1_1.jpg", "1_2.jpg", "12_1.jpg"], ["12_7.jpg", "1_9.jpg"]
    write(base, images("Gallery_Match", gallery) | images("Probe", probe))
    write(base, images("Gallery_Distractor", ["d1.jpg", "d2.jpg"]))
    save_list(base / "gallery_match_img_ID_pairs.mat", "gallery", gallery, np.uint16([1, 1, 12]))
    # whole numbers in one list and floating ones in the other are the same people
    save_list(base / "probe_img_ID_pairs.mat", "probe", probe, [12.0, 1.0])
    return base


@pytest.mark.parametrize("above", [0, 1, 2])
def test_tinyface(tiny, above):
    root = [tiny, *tiny.parents][above]
    with pytest.warns(UserWarning, match="2 images and the published set 153,428"):
        found = open_evaluation(root, crop="sphereface")
    faces = found.faces
    assert found.name == "tinyface"
    gallery = [faces.names[i] for i in found.gallery]
    assert gallery[:3] == [f"Gallery_Match/{n}" for n in ("1_1.jpg", "1_2.jpg", "12_1.jpg")]
    assert gallery[3:] == ["Gallery_Distractor/d1.jpg", "Gallery_Distractor/d2.jpg"]
    assert faces.identities == ("1", "12")
    assert faces.labels[found.gallery].tolist() == [0, 0, 1, -1, -1]
    assert faces.labels[found.probes["probe"]].tolist() == [1, 0]
    assert faces.read(0).shape == (3, 16, 20)
    assert len(tinyface(root, distractors=False).gallery) == 3


def test_tinyface_missing_images_are_named(tiny):
    for name in ("d1.jpg", "d2.jpg"):
        (tiny / "Gallery_Distractor" / name).unlink()
    with pytest.raises(DataError, match=r"_Distractor: there are no (?s:.*)distractors=False"):
        tinyface(tiny)
    (tiny / "Gallery_Match/1_2.jpg").unlink()
    with pytest.raises(DataError, match=r"gallery_match_img_ID_pairs\.mat:row 2: .*1_2\.jpg"):
        tinyface(tiny, distractors=False)
    with pytest.warns(UserWarning, match="left out"):
        found = tinyface(tiny, distractors=False, skip_missing=True)
    assert len(found.gallery) == 2
    assert len(found.faces.skipped) == 1


@FEWER
def test_tinyface_with_points(tiny, tmp_path):
    names = tinyface(tiny).faces.names
    table = tmp_path / "points.csv"
    small = ",".join(str(float(number) / 7) for number in NUMBERS.split(","))
    table.write_text("".join(f"{name},{small}\n" for name in names))
    assert tinyface(tiny, landmarks=table).faces.landmarks.shape == (7, 5, 2)
    for text, what in (
        (f"{small}\n".join(f"{name}," for name in names), "no points of"),
        ("".join(f"{name},{NUMBERS}\n" for name in names), r"outside 7 of 7 photos.*\(20x16\)"),
    ):
        table.write_text(text)
        with pytest.raises(DataError, match=rf"points\.csv.*: (?s:.*){what}"):
            tinyface(tiny, landmarks=table)


@pytest.mark.parametrize("damage", ["cut", "garbage", "other", "count", "bomb"])
def test_damaged_list_is_named(tiny, damage):
    path = tiny / "probe_img_ID_pairs.mat"
    data = path.read_bytes()
    if damage == "other":
        save(path, something=np.ones(3))
    elif damage == "bomb":
        save(path, probe_set=np.zeros(10_000_001, dtype=np.uint8))
    elif damage == "count":
        column = np.array([["12_7.jpg"], ["1_9.jpg"]], dtype=object)
        save(path, probe_set=column, probe_ids=np.array([[12]]))
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"garbage" * 100)
    with pytest.raises(DataError, match=r"probe_img_ID_pairs\.mat: "):
        tinyface(tiny)


@pytest.fixture
def surv(tmp_path):
    base = tmp_path / "QMUL-SurvFace/Face_Identification_Test_Set"
    gallery, mated = ["5_cam1_1.jpg", "7_cam2_1.jpg"], ["7_cam1_1.jpg", "5_cam2_1.jpg", "5_x.jpg"]
    write(base, images("gallery", gallery) | images("mated_probe", mated))
    write(base, images("unmated_probe", ["u1.jpg"]))
    save_list(base / "gallery_img_ID_pairs.mat", "gallery", gallery, [1, 2])
    save_list(base / "mated_probe_img_ID_pairs.mat", "mated_probe", mated, [2, 1, 1])
    base = tmp_path / "QMUL-SurvFace/Face_Verification_Test_Set"
    names = [f"{person}_{shot}.jpg" for person in range(12) for shot in range(2)]
    write(base, images("verification_images", names))
    positive = np.array([[f"{p}_0.jpg", f"{p}_1.jpg"] for p in range(12)], dtype=object)
    negative = np.array([[f"{p}_0.jpg", f"{(p + 1) % 12}_1.jpg"] for p in range(12)], dtype=object)
    save(base / "positive_pairs_names.mat", positive_pairs_names=positive)
    save(base / "negative_pairs_names.mat", negative_pairs_names=negative)
    return tmp_path


def test_survface_identification(surv):
    found = open_evaluation(surv, "survface-identification", crop="arcface")
    labels = found.faces.labels
    assert labels[found.gallery].tolist() == [0, 1]
    assert labels[found.probes["mated"]].tolist() == [1, 0, 0]
    assert labels[found.probes["unmated"]].tolist() == [-1]
    assert survface_identification(surv / "QMUL-SurvFace").faces.names == found.faces.names


def test_survface_verification(surv):
    found = open_evaluation(surv, "survface-verification", crop="arcface")
    pairs, names = found.pairs, found.faces.names
    assert pairs.same.tolist() == [True] * 12 + [False] * 12
    assert names[pairs.first[13]] == "verification_images/1_0.jpg"
    assert names[pairs.second[13]] == "verification_images/2_1.jpg"
    assert found.faces.labels is None
    for fold in range(10):
        assert pairs.same[pairs.fold == fold].double().mean() == 0.5


def test_survface_missing_image_is_named_with_its_row(surv):
    base = surv / "QMUL-SurvFace/Face_Verification_Test_Set"
    (base / "verification_images/3_1.jpg").unlink()
    with pytest.raises(DataError) as caught:
        survface_verification(surv)
    where = [fault.where.rpartition("/")[2] for fault in caught.value.faults]
    assert where == ["positive_pairs_names.mat:row 4", "negative_pairs_names.mat:row 3"]
    with pytest.warns(UserWarning, match="left out"):
        assert len(survface_verification(surv, skip_missing=True).pairs) == 22


@pytest.mark.parametrize(
    ("names", "identities", "what"),
    [
        (["7_cam1_1.jpg", "5_cam2_1.jpg"], [2, 1], r"5_x\.jpg: mated_.* does not list it"),
        (["7_cam1_1.jpg", "5_x.jpg", "5_cam2_1.jpg"], [2, 1, 3], "identity 3 has no face"),
        (["7_cam1_1.jpg"] * 2, [2, 2], "it lists 1 images a second time"),
        (None, None, "unmated_probe: there are no images"),
    ],
)
def test_lists_and_folders_must_agree(surv, names, identities, what):
    base = surv / "QMUL-SurvFace/Face_Identification_Test_Set"
    if names is None:
        (base / "unmated_probe/u1.jpg").unlink()
    else:
        save_list(base / "mated_probe_img_ID_pairs.mat", "mated_probe", names, identities)
    with pytest.raises(DataError, match=what):
        survface_identification(surv)


@pytest.fixture(params=["distances", "all"])
def cameras(request, tmp_path):
    base = tmp_path / "SCface_database"
    write(base, images("mugshot_frontal_cropped_all", [f"{s:03d}_frontal.JPG" for s in (1, 2, 51)]))
    for distance in (1, 2, 3):
        for camera in range(1, 8):
            folder = f"surveillance_cameras_distance_{distance}/cam_{camera}"
            if request.param == "all":
                folder = "surveillance_cameras_all"
            shots = [f"{s:03d}_cam{camera}_{distance}.jpg" for s in (1, 2, 51)]
            write(base, images(folder, shots))
    if request.param == "all":
        write(base, images("surveillance_cameras_all", ["001_cam8.jpg"]))
    return tmp_path


def test_scface(cameras):
    found = scface(cameras, subjects=(1, 2, 51))
    names = found.faces.names
    assert [names[i][-15:] for i in found.gallery] == [f"{s:03d}_frontal.JPG" for s in (1, 2, 51)]
    assert found.faces.labels[found.gallery].tolist() == [0, 1, 2]
    assert list(found.probes) == ["d1", "d2", "d3"]
    for distance in (1, 2, 3):
        probes = [names[i] for i in found.probes[f"d{distance}"]]
        assert len(probes) == 3 * 5  # cameras 6 and 7 are infrared
        assert all(name.endswith(f"_{distance}.jpg") for name in probes)
    assert found.faces.labels[found.probes["d2"]].bincount().tolist() == [5, 5, 5]
    assert scface(cameras, subjects=range(51, 52)).faces.identities == ("051",)


def test_scface_lost_pictures_are_named(cameras):
    with pytest.raises(DataError, match="subject 003 has no mugshot"):
        scface(cameras, subjects=(1, 3))
    with pytest.warns(UserWarning, match="subject 003"):
        assert len(scface(cameras, subjects=(1, 3), skip_missing=True).gallery) == 1
    (lost,) = cameras.rglob("002_cam3_1.jpg")
    lost.unlink()
    with pytest.raises(DataError, match=r"there is no 002_cam3_1\.jpg"):
        scface(cameras, subjects=(1, 2, 51))
