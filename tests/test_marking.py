import pytest
import torch
from minilfw import mini_lfw
from PIL import Image

from idloss.data import DataError, folder_faces, lfw, open_evaluation, open_faces
from idloss.detection import Detections
from idloss.detection.base import as_photos
from idloss.geometry import get_template
from idloss.marking import main_face, mark

POINTS = torch.tensor(get_template("sphereface").points)


def finds(images):
    """The face in the middle of each photo, beside a small one; none in black ones."""
    found = []
    for image in as_photos(images):
        middle = (torch.tensor(image.shape[:0:-1]) - 1) / 2
        points = torch.stack([POINTS * 0.2, POINTS + middle - POINTS.mean(0)])
        boxes = torch.cat((points.amin(1), points.amax(1)), 1)
        count = 2 if image.any() else 0
        found.append(Detections(boxes[:count], torch.ones(count), points[:count]))
    return found


def test_lfw_is_evaluated_and_prepared_by_points_of_a_detector(tmp_path):
    data = mini_lfw(tmp_path / "data", people=3, photos=3)
    (data / "lfw_landmarks.csv").unlink()
    assert lfw(data).faces.landmarks is None
    with pytest.raises(ValueError, match=r"no landmarks .*\(idloss landmarks .* FILE finds them\)"):
        open_evaluation(data)
    count, faults = mark(data, tmp_path / "own.csv", finds)
    assert (count, faults) == (9, [])
    faces = lfw(data, landmarks=tmp_path / "own.csv").faces
    height, width = faces.read(0).shape[1:]
    middle = torch.tensor([(width - 1) / 2, (height - 1) / 2])
    assert (faces.landmarks.mean(1) - middle).abs().max() < 1e-3


def test_a_folder_gets_the_table_that_it_lacked(tmp_path):
    """Beside photos one folder down, and what has no face is told."""
    for name, colour in (("b/x.png", "red"), ("b/c/y.png", "blue"), ("b/none.png", "black")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (150, 160), colour).save(tmp_path / name)
    (tmp_path / "b" / "cut.jpg").write_bytes(b"no picture")
    with pytest.raises(FileNotFoundError, match="idloss landmarks"):
        folder_faces(tmp_path)
    count, faults = mark(tmp_path, tmp_path / "b" / "landmarks.csv", finds)
    assert count == 2
    assert sorted(fault.what.partition(" (")[0] for fault in faults) == [
        "no face was found",
        "unreadable image",
    ]
    with pytest.warns(UserWarning, match="no line of 2 pictures"):
        faces = open_faces(tmp_path)
    assert sorted(faces.names) == ["c/y.png", "x.png"]


def test_a_folder_without_pictures_gets_no_table(tmp_path):
    (tmp_path / "a.txt").write_text("none")
    with pytest.raises(DataError, match="holds no pictures"):
        mark(tmp_path, tmp_path / "landmarks.csv", finds)
    assert not (tmp_path / "landmarks.csv").exists()


def test_the_main_face_is_large_and_near_the_middle():
    boxes = torch.tensor([[0.0, 0, 40, 40], [40.0, 40, 60, 60], [70, 70, 100, 100]])
    found = Detections(boxes, torch.ones(3), torch.zeros(3, 5, 2))
    assert main_face(found, (101, 101)) == 1
    assert main_face(found, (41, 41)) == 0
