"""The example, on a few drawn faces and on a few real ones."""

import importlib.util
import sys
import tarfile

import pytest
import torch
from conftest import ROOT
from timm.models import save_for_hf
from tinytraining import losses

from idloss import create_fnet
from idloss.data import SyntheticFaces
from idloss.fnets.mobilefacenet import mobilefacenet_bubbliiiing

SCRIPT = ROOT / "examples" / "train_fnet.py"
FAST = ["trackers=[]", "log_every=1"]


@pytest.fixture
def example(monkeypatch):
    spec = importlib.util.spec_from_file_location("train_fnet", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def few(identities, photos, **options):
        return SyntheticFaces(identities // 10, photos // 2, **options)

    monkeypatch.setattr(module, "SyntheticFaces", few)
    return module


def options(example, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
    return example.parse()


def test_without_data_it_trains_on_drawn_faces_and_verifies_others(example, monkeypatch, tmp_path):
    words = ["--out", tmp_path, "--device", "cpu", *FAST, "iterations=3", "batch_size=16"]
    with example.console.capture() as shown:
        example.main(options(example, monkeypatch, *words, "low_resolution=0.5"))
    for word in ("saved:", "people not trained on", "before", "after"):
        assert word in shown.get()
    assert list(losses(tmp_path)) == [1, 2, 3]
    fnet = create_fnet(f"local-dir:{tmp_path}/model", pretrained=True)
    assert fnet(torch.rand(2, 3, 56, 48)).shape == (2, 128)


def test_pairs_are_half_of_one_person_and_half_of_two(example):
    faces = SyntheticFaces(8, 5).render(progress=False)
    pairs = example.all_pairs(faces)
    assert len(pairs) == 2 * 8 * 10
    assert pairs.same.float().mean() == 0.5
    assert (faces.labels[pairs.first] == faces.labels[pairs.second]).equal(pairs.same)
    assert (pairs.first != pairs.second).all()
    assert pairs.fold.bincount().tolist() == [16] * 10
    assert all(pairs.same[pairs.fold == fold].float().mean() == 0.5 for fold in range(10))


def test_with_a_teacher_real_faces_need_no_names(example, monkeypatch, shared, tmp_path):
    """A dozen photos of CelebA and a real recogniser, two steps."""
    state = torch.load(shared("weights/arcface_mobilefacenet.pth"), weights_only=True)
    teacher = create_fnet("mobilefacenet")
    teacher.load_state_dict(mobilefacenet_bubbliiiing(state))
    save_for_hf(teacher, tmp_path / "teacher", safe_serialization=True)
    photos = tmp_path / "celeba_wild"
    with tarfile.open(shared("data/celeba_wild.tar")) as archive:
        table = archive.extractfile("celeba_wild/landmarks.csv").read().decode().splitlines()
        rows = [row.split(",")[:11] for row in table[:13]]
        members = [archive.getmember(f"celeba_wild/{row[0]}") for row in rows[1:]]
        archive.extractall(tmp_path, members, filter="data")
    (photos / "landmarks.csv").write_text("\n".join(",".join(row) for row in rows) + "\n")
    words = ["--data", photos, "--teacher", f"local-dir:{tmp_path}/teacher", "--device", "cpu"]
    words += ["--recipe", "fnet_mobilefacenet", "--out", tmp_path / "out", *FAST]
    words += ["iterations=2", "batch_size=6", "workers=0", "warmup=0", "device=cpu"]
    example.main(options(example, monkeypatch, *words))
    assert all(0 < row[0] < 2 for row in losses(tmp_path / "out").values())
    assert create_fnet(f"local-dir:{tmp_path}/out/model", pretrained=True).num_features == 128
