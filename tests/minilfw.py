"""A miniature LFW on disk: drawn people in LFW's layout, with points and pairs."""

import itertools

import numpy as np
from PIL import Image

from idloss.data import draw_faces
from idloss.data.landmarks import MEAN_FACE, POINT_COLUMNS
from idloss.data.pairs import lfw_name


def face_like(crop):
    """A drawn arcface crop with more of a real face, as uint8 `[112, 112, 3]`."""
    mean = np.pad(2 * np.array(MEAN_FACE).repeat(8, 0).repeat(8, 1), ((32, 16), (32, 32)), "edge")
    return (crop.permute(1, 2, 0).numpy() + mean[..., None]).clip(0, 255).astype(np.uint8)


def mini_lfw(root, people=6, photos=4):
    """Photos, `lfw_landmarks.csv` and a `pairs.txt` of two folds below a folder."""
    faces = draw_faces(people, photos, seed=5, size=(112, 112), crop="arcface")
    # points are where a detector finds them, not quite where they are
    found = faces.landmarks.numpy() + np.random.default_rng(5).normal(0, 1, (len(faces), 5, 2))
    rows = []
    for index, (crop, points) in enumerate(zip(faces.crops, found, strict=True)):
        name = lfw_name(f"Person_{index // photos}", index % photos + 1)
        path = root / "lfw" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # a margin, so that there is something to align
        photo = np.pad(face_like(crop), ((9, 9), (9, 9), (0, 0)), mode="edge")
        Image.fromarray(photo).save(path, quality=95)
        rows.append(",".join([name, *(f"{value + 9:.4f}" for value in points.ravel())]))
    (root / "lfw_landmarks.csv").write_text("\n".join(rows) + "\n")
    write_pairs(root / "pairs.txt", people, photos)
    return root


def write_pairs(path, people, photos, folds=2):
    """As many pairs of one person as of two in each fold."""
    same = [
        f"Person_{person}\t{a}\t{b}"
        for person in range(people)
        for a, b in itertools.combinations(range(1, photos + 1), 2)
    ]
    different = [
        f"Person_{a}\t{photo}\tPerson_{b}\t{photo}"
        for a, b in itertools.combinations(range(people), 2)
        for photo in range(1, photos + 1)
    ]
    half = min(len(same), len(different)) // folds
    lines = [f"{folds}\t{half}"]
    for fold in range(folds):
        part = slice(fold * half, (fold + 1) * half)
        lines += same[part] + different[part]
    path.write_text("\n".join(lines) + "\n")


def photo_folder(root, people=4, photos=3):
    """The same photos as a folder with a `landmarks.csv`, as `open_faces` takes it."""
    mini_lfw(root, people, photos)
    rows = (root / "lfw_landmarks.csv").read_text().splitlines()
    rows = [f"{row},{row.split('/')[0]}" for row in rows]
    header = ",".join(["image_id", *POINT_COLUMNS, "identity"])
    (root / "lfw" / "landmarks.csv").write_text("\n".join([header, *rows]) + "\n")
    return root / "lfw"
