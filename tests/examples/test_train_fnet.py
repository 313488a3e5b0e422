"""The example, on a few drawn faces and on a few real ones."""

import pytest
import torch
from timm.models import save_for_hf
from tinytraining import losses

from idloss import create_fnet
from idloss.data import draw_faces
from idloss.fnets.mobilefacenet import mobilefacenet_bubbliiiing

FAST = ["trackers=[]", "log_every=1"]


@pytest.fixture
def script(example, monkeypatch):
    module = example("train_fnet")

    def few(identities, photos, **options):
        return draw_faces(identities // 10, photos // 2, **options)

    monkeypatch.setattr(module, "draw_faces", few)
    return module


def call(script, monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["train_fnet.py", *map(str, words)])
    script.main(script.parse())


def test_without_data_it_trains_on_drawn_faces_and_verifies_others(script, monkeypatch, tmp_path):
    words = ["--out", tmp_path, "--device", "cpu", *FAST, "iterations=3", "batch_size=16"]
    with script.console.capture() as shown:
        call(script, monkeypatch, *words, "low_resolution=0.5")
    for word in ("saved:", "people not trained on", "before", "after"):
        assert word in shown.get()
    assert list(losses(tmp_path)) == [1, 2, 3]
    fnet = create_fnet(f"local-dir:{tmp_path}/model", pretrained=True)
    assert fnet(torch.rand(2, 3, 56, 48)).shape == (2, 128)


def test_pairs_are_half_of_one_person_and_half_of_two(script):
    faces = draw_faces(8, 5)
    pairs = script.all_pairs(faces)
    assert len(pairs) == 2 * 8 * 10
    assert pairs.same.float().mean() == 0.5
    assert (faces.labels[pairs.first] == faces.labels[pairs.second]).equal(pairs.same)
    assert (pairs.first != pairs.second).all()
    assert pairs.fold.bincount().tolist() == [16] * 10
    assert all(pairs.same[pairs.fold == fold].float().mean() == 0.5 for fold in range(10))


def test_with_a_teacher_real_faces_need_no_names(script, photos, monkeypatch, shared, tmp_path):
    """A dozen photos of CelebA and a real recogniser, two steps."""
    state = torch.load(shared("weights/arcface_mobilefacenet.pth"), weights_only=True)
    teacher = create_fnet("mobilefacenet")
    teacher.load_state_dict(mobilefacenet_bubbliiiing(state))
    save_for_hf(teacher, tmp_path / "teacher", safe_serialization=True)
    words = ["--data", photos(12, columns=11), "--teacher", f"local-dir:{tmp_path}/teacher"]
    words += ["--recipe", "fnet_mobilefacenet", "--out", tmp_path / "out", *FAST]
    words += ["iterations=2", "batch_size=6", "workers=0", "warmup=0", "device=cpu"]
    call(script, monkeypatch, *words, "--device", "cpu")
    assert all(0 < row[0] < 2 for row in losses(tmp_path / "out").values())
    assert create_fnet(f"local-dir:{tmp_path}/out/model", pretrained=True).num_features == 128
