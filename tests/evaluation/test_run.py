"""The bench end to end, against the same written the slow way with OpenCV, and its cache."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from minilfw import mini_lfw
from nets import TinyFNet, TinySRNet, tiny_fnet
from tinybench import SIZES, assert_same_scores, drawn_pairs, run, scores
from torch import nn

from idloss import create_srnet
from idloss.data import DataError, EvaluationSet, Fault, Pairs, draw_faces, open_evaluation
from idloss.encoder import FaceEncoder
from idloss.evaluation import (
    HR,
    Cell,
    Results,
    compare,
    comparison_table,
    embedding,
    evaluate,
    get_protocol,
    paper_table,
    write_sheets,
)
from idloss.evaluation.cache import EmbeddingCache
from idloss.evaluation.embedding import SR_CROP, Networks, ready
from idloss.resample import to_float


@pytest.fixture
def calls(monkeypatch):
    """How many images each forward pass of any TinyFNet or TinySRNet saw."""
    seen = []
    for kind in (TinyFNet, TinySRNet):
        real = kind.forward

        def counted(self, x, real=real, name=kind.__name__):
            seen.append((name, tuple(x.shape)))
            return real(self, x)

        monkeypatch.setattr(kind, "forward", counted)
    return seen


class Naive:
    """The paper's protocol, one image at a time, with OpenCV."""

    def __init__(self, fnet, width=96):
        self.fnet, self.width = fnet, width
        cfg = fnet.pretrained_cfg
        self.mean, self.std = np.array(cfg["mean"]), np.array(cfg["std"])
        self.margin = (cfg["input_size"][2] - width) // 2

    @torch.no_grad()
    def look(self, *views):
        """RGB pictures in [0, 1], `[112, 96, 3]`."""
        found = []
        for image in views:
            wide = cv2.copyMakeBorder(image, 0, 0, self.margin, self.margin, cv2.BORDER_REPLICATE)
            x = torch.from_numpy((wide - self.mean) / self.std).float().permute(2, 0, 1)
            found.append(self.fnet(x[None])[0].double().numpy())
        return np.concatenate(found)

    def full(self, crop):
        return self.look(crop / 255, np.ascontiguousarray(crop[:, ::-1]) / 255)

    @torch.no_grad()
    def probe(self, crop, method, size, srnet):
        small = cv2.resize(crop, size[::-1], interpolation=cv2.INTER_CUBIC)
        views = []
        for view in (small, np.ascontiguousarray(small[:, ::-1])):
            if method in ("bilinear", "bicubic"):
                kind = cv2.INTER_LINEAR if method == "bilinear" else cv2.INTER_CUBIC
                large = cv2.resize(view, (self.width, 112), interpolation=kind) / 255
            else:
                x = torch.from_numpy(view).permute(2, 0, 1)[None].float() / 255
                sr = srnet(x)[0].permute(1, 2, 0).numpy()
                if sr.shape != (112, self.width, 3):
                    levels = np.floor(sr * 255).clip(0, 255).astype(np.uint8)
                    sr = cv2.resize(levels, (self.width, 112), interpolation=cv2.INTER_CUBIC) / 255
                large = sr.astype(np.float64)
            views.append(large)
        return self.look(*views)


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.parametrize(("crop", "width"), [("sphereface", 96), ("arcface", 112)])
def test_grid_equals_the_slow_way(crop, width, data, srnets):
    net = tiny_fnet(seed=1, size=(112, width))
    net.crop = crop
    sizes = (*SIZES, (56, 48))  # there tiny gives 112x96, which is shown as it is
    found = evaluate(data, {"f": net}, srnets, sizes, progress=False, cache=False)
    slow = Naive(net.eval())
    crops = data.faces.crops.permute(0, 2, 3, 1).numpy()
    pairs = list(zip(data.pairs.first.tolist(), data.pairs.second.tolist(), strict=True))
    gallery = {a: slow.full(crops[a]) for a in {a for pair in pairs for a in pair}}
    expected = [cosine(gallery[a], gallery[b]) for a, b in pairs]
    np.testing.assert_allclose(scores(found, "f", HR, (112, 96)), expected, atol=2e-6)
    for method, srnet in srnets.items():
        for size in sizes:
            probes = {b: slow.probe(crops[b], method, size, srnet) for b in {b for _, b in pairs}}
            expected = [cosine(gallery[a], probes[b]) for a, b in pairs]
            np.testing.assert_allclose(scores(found, "f", method, size), expected, atol=1e-5)


def test_faces_of_the_real_world_are_the_same_in_any_batch_and_on_the_sheets(
    data, fnet, srnets, tmp_path, monkeypatch
):
    options = {"protocol": "real_world", "cache": False, "batch_size": 3}
    found = run(data, {"f": fnet}, srnets, **options)
    assert_same_scores(run(data, {"f": fnet}, srnets, **options | {"batch_size": 8}), found)
    plain = run(data, {"f": fnet}, srnets, cache=False)
    key = ("f", "bicubic", SIZES[0])
    assert not np.allclose(scores(found, *key), scores(plain, *key), atol=1e-3)
    np.testing.assert_array_equal(*(scores(one, "f", HR, (112, 96)) for one in (found, plain)))
    with pytest.raises(ValueError, match="the protocol"):
        compare(plain, found)
    drawn = []
    real = Networks.restore

    def watched(networks, name, probes, reference):
        drawn.append(real(networks, name, probes, reference)[1])
        return real(networks, name, probes, reference)

    monkeypatch.setattr(Networks, "restore", watched)
    everyone = replace(data, pairs=None)
    places = torch.arange(len(data.faces))
    write_sheets(
        tmp_path, everyone, {"f": fnet}, srnets, SIZES[:1], count=len(places), protocol="real_world"
    )
    # a probe's cosine to its own HR on the sheet, and in a bench that pairs faces with themselves
    second = torch.cat((places, places.roll(1)))
    own = Pairs(places.repeat(2), second, places.repeat(2) == second, places.repeat(2) % 2)
    alone = scores(run(replace(data, pairs=own), {"f": fnet}, srnets, **options), *key)
    np.testing.assert_allclose(alone[: len(places)], drawn[0]["bicubic"].numpy(), atol=2e-6)


def test_an_srnet_and_an_fnet_of_112x112_meet_without_a_cut(tmp_path):
    """Not over 112x96 with edges repeated; both crops stand in the table under their names."""
    faces = draw_faces(5, 4, seed=2, size=(112, 112), crop="arcface")
    data = replace(drawn_pairs(), faces=faces)
    net = tiny_fnet(seed=1, size=(112, 112)).eval()
    net.crop = "arcface"
    wide = {name: create_srnet(name) for name in ("bicubic_arcface", "bilinear_arcface")}
    wide["tiny"] = create_srnet(TinySRNet().eval(), crop="arcface")
    srnets = {"bicubic": create_srnet("bicubic"), **wide}
    found = evaluate(data, {"f": net}, srnets, [(14, 12)], cache=False, progress=False)
    slow, crops = Naive(net, width=112), faces.crops.permute(0, 2, 3, 1).numpy()
    pairs = list(zip(data.pairs.first.tolist(), data.pairs.second.tolist(), strict=True))
    for method, srnet in wide.items():
        name = method.removesuffix("_arcface")
        expected = [
            cosine(slow.full(crops[a]), slow.probe(crops[b], name, (14, 14), srnet))
            for a, b in pairs
        ]
        np.testing.assert_allclose(scores(found, "f", method, (14, 14)), expected, atol=1e-5)
    sizes = {cell.srnet: cell.size for cell in found.cells() if cell.srnet != HR}
    assert sizes == {"bicubic": "14x12", **dict.fromkeys(wide, "14x14")}
    assert all(f"| {name} " in paper_table(found, "verification") for name in srnets)
    sheets = write_sheets(tmp_path, data, {"f": net}, srnets, [(14, 12)], count=1, device="cpu")
    assert [path.name for path in sheets] == ["faces-14x12.png", "faces-14x12.pdf"]


def test_second_run_computes_what_is_new_only(data, fnet, srnets, calls):
    first = run(data, {"f": fnet}, srnets, batch_size=64)
    calls.clear()
    again = run(data, {"f": fnet}, srnets, protocol="sphereface")  # the same pictures
    assert not any(shape[0] > 2 for _, shape in calls)  # two images tell what a network is
    assert_same_scores(again, first, atol=0)
    with torch.no_grad():
        srnets["tiny"].body[0].weight[0, 0, 0, 0] += 0.1
    run(data, {"f": fnet}, srnets, batch_size=64)
    faces = [(name, shape) for name, shape in calls if shape[0] > 2]
    probes = len(data.pairs.second.unique())
    assert sum(shape[0] for name, shape in faces if name == "TinyFNet") == 2 * probes * len(SIZES)
    assert {shape[2:] for name, shape in faces if name == "TinySRNet"} == set(SIZES)


def test_faces_are_read_once_and_tasks_share_embeddings(data, fnet, srnets, calls, monkeypatch):
    read = []
    real = type(data.faces).crops_at

    def watched(faces, places, *crop, **options):
        read.extend(places.tolist())
        return real(faces, places, *crop, **options)

    monkeypatch.setattr(type(data.faces), "crops_at", watched)
    tasks = ("verification", "identification", "open-set")  # the first has other sizes
    options = {"draws": 3, "cache": False, "progress": False, "device": "cpu"}
    found = evaluate(data, {"f": fnet}, srnets, tasks=tasks, **options)
    assert sorted(read) == list(range(len(data.faces)))
    sizes = {task: {cell.size for cell in found.cells(task) if cell.srnet != HR} for task in tasks}
    assert sizes["verification"] == {"7x6", "14x12", "16x16", "28x24"}
    assert sizes["identification"] == sizes["open-set"] == {"7x6", "14x12", "16x14", "18x16"}
    assert 0 <= found.value(Cell("identification", "f", "tiny", 14, 12), "rank1") <= 1
    assert found.arrays[Cell("open_set", "f", HR, 112, 96)]["tpir"].shape == (3, 3)
    calls.clear()
    run(data, {"f": fnet}, srnets, tasks=tasks[1:], cache=False, draws=3)
    seen = sum(shape[0] for name, shape in calls if name == "TinyFNet" and shape[0] > 2)
    assert seen == 2 * len(data.faces) * (1 + len(srnets) * len(SIZES))


def test_interrupted_run_goes_on_where_it_left_off(data, fnet, home, calls, monkeypatch):
    class Interrupted(nn.Module):
        """Ctrl-C at the fourth batch, once, after two that tell what it is."""

        seen = 0

        def forward(self, x):
            type(self).seen += 1
            if self.seen == 2 + 4:
                raise KeyboardInterrupt
            return x

    def work():
        options = {"batch_size": 1, "progress": False}
        return evaluate(data, {"f": fnet}, {"n": Interrupted()}, SIZES[:1], **options)

    with pytest.raises(KeyboardInterrupt):
        work()
    kept = sum(len(EmbeddingCache(home).known(key.name)) for key in home.iterdir())
    assert kept >= 3 + 3  # at full resolution and degraded
    calls.clear()
    work()
    faces = len(torch.cat((data.pairs.first, data.pairs.second)).unique())
    seen = len(calls)
    work()  # telling what the network is, and folding batch norm
    assert 2 * seen - len(calls) == faces + len(data.pairs.second.unique()) - kept


def test_embeddings_do_not_wait_in_memory_for_long(data, fnet, srnets, home, monkeypatch):
    monkeypatch.setattr(embedding, "FLUSH_SECONDS", 0.0)
    found = run(data, {"f": fnet}, srnets, batch_size=1)
    assert len([*home.rglob("*.safetensors")]) > len(data.faces)  # one a batch and cell
    assert_same_scores(found, run(data, {"f": fnet}, srnets, cache=False))


def test_changed_face_is_embedded_anew(data, fnet, calls):
    run(data, {"f": fnet}, {})
    calls.clear()
    crops = data.faces.crops.clone()
    crops[5] = 255 - crops[5]
    changed = replace(data, faces=replace(data.faces, crops=crops))
    found = run(changed, {"f": fnet}, {})
    seen = len(calls)
    run(changed, {"f": fnet}, {})  # telling what the network is, and folding batch norm
    assert 2 * seen - len(calls) == 1  # both views in one batch
    with pytest.raises(ValueError, match=r"data sets of the runs differ.*: content"):
        compare(run(data, {"f": fnet}, {}), found)


def test_face_that_changes_during_the_run_is_not_kept(data, fnet, home):
    class Replaced(type(data.faces)):
        def crops_at(self, indices, crop=None, *, faults=None):
            self.crops[1] = 255 - self.crops[1]
            return super().crops_at(indices, crop)

    about = {**vars(data.faces), "crops": data.faces.crops.clone()}
    changed = replace(data, faces=Replaced(**about))
    with pytest.raises(DataError, match="0/1: changed while it was read"):
        run(changed, {"f": fnet}, {}, batch_size=64)
    assert not [*home.rglob("*.safetensors")]


def test_unreadable_faces_are_counted_named_and_skipped_only_when_asked(data, fnet, srnets):
    class Damaged(type(data.faces)):
        def crops_at(self, indices, crop=None, *, faults=None):
            for index in {1, 6} & set(indices.tolist()):
                faults[index] = Fault(f"{self.names[index]}.jpg", "unreadable image")
            return super().crops_at(indices, crop)

    faces = Damaged(**vars(data.faces))
    broken = replace(data, faces=faces)
    with pytest.raises(DataError, match="2 faults") as caught:
        run(broken, {"f": fnet}, srnets)
    assert "0/1.jpg" in str(caught.value)
    with pytest.warns(UserWarning, match="left out"):
        found = run(broken, {"f": fnet}, srnets, skip_missing=True, tasks=("verification",))
    assert found.run["judged"]["verification"]["pairs"] == len(data.pairs) - 3
    assert len(found.run["data"]["skipped"]) == 2
    assert found.run["skip_missing"] is True
    intact = run(data, {"f": fnet}, srnets)
    kept = ~np.isin(data.pairs.second.numpy(), (1, 6))
    np.testing.assert_allclose(
        scores(found, "f", "tiny", (14, 12)), scores(intact, "f", "tiny", (14, 12))[kept]
    )


@pytest.mark.parametrize("crop", ["ffhq", "arcface"])
def test_photos_are_aligned_to_the_crop_of_each_fnet(crop, tmp_path):
    data = open_evaluation(mini_lfw(tmp_path, people=4, photos=3))
    fnet = tiny_fnet(size=(112, 112))
    fnet.crop = crop
    found = run(data, {"f": fnet}, {})
    encoder = FaceEncoder(fnet, crop=crop, interpolation="bicubic")
    images = to_float(data.faces.crops_at(torch.arange(len(data.faces)), crop))
    rows = torch.cat((encoder(images), encoder(images.flip(-1))), 1)
    expected = nn.functional.cosine_similarity(rows[data.pairs.first], rows[data.pairs.second])
    np.testing.assert_allclose(scores(found, "f", HR, (112, 96)), expected, atol=1e-5)


def test_unknown_people_are_not_taken_for_one(data, fnet):
    labels = torch.where(torch.arange(20) < 16, data.faces.labels, -1)
    all_faces = EvaluationSet("some", replace(data.faces, labels=labels))
    known = EvaluationSet("known", data.faces.select(labels >= 0))
    tasks = ("identification", "open_set")
    found, expected = (run(one, {"f": fnet}, {}, tasks=tasks) for one in (all_faces, known))
    assert found.run["judged"]["identification"]["subjects"] == 4
    for cell in found.cells("identification"):
        np.testing.assert_array_equal(found.arrays[cell]["cmc"], expected.arrays[cell]["cmc"])
    assert found.run["draws"] == expected.run["draws"]  # strangers of the open set


def test_own_gallery_is_searched(data, fnet, srnets):
    labels = data.faces.labels.clone()
    labels[16:] = -1  # the last person is a stranger
    faces = replace(data.faces, labels=labels)
    gallery = torch.arange(0, 16, 4)
    near, far = gallery + 1, torch.cat((gallery + 2, torch.arange(16, 20)))
    own = EvaluationSet("own", faces, gallery=gallery, probes={"near": near, "far": far})
    found = run(own, {"f": fnet}, srnets, tasks=("identification", "open_set"))
    hr = Cell("identification", "f", HR, 112, 96)
    with ready({"f": fnet}, {}, get_protocol("paper"), torch.device("cpu")) as networks:
        rows = networks.embed_hr("f", data.faces.crops, SR_CROP)
    rows = nn.functional.normalize(rows)
    for name, places in (("near", near), ("far", far[:4])):
        best = (rows[places] @ rows[gallery].T).argmax(1)
        expected = (labels[gallery][best] == labels[places]).float().mean()
        assert found.value(hr, f"rank1 {name}") == pytest.approx(float(expected))
    assert found.arrays[hr]["correct"].shape == (8,)
    stranger = (rows[16:20] @ rows[gallery].T).amax(1).max()
    mated = torch.cat((near, far[:4]))
    right = (rows[mated] * rows[gallery].repeat(2, 1)).sum(1)
    top = (rows[mated] @ rows[gallery].T).amax(1)
    expected = ((right >= top - 1e-6) & (right > stranger)).float().mean()
    open_hr = Cell("open_set", "f", HR, 112, 96)
    assert found.value(open_hr, "tpir@fpir=0.01") == pytest.approx(float(expected))
    # one gallery, no draws: runs are compared probe by probe
    laxest = found.arrays[open_hr]["correct"]
    assert laxest.mean() == pytest.approx(found.value(open_hr, "tpir@fpir=0.3"))
    compared = {one.metric: one for one in compare(found, found, srnets=("bilinear", "tiny"))}
    assert set(compared) == {"rank1", "tpir@fpir=0.3"}
    assert {one.test for one in compared.values()} == {"McNemar, exact"}
    with pytest.raises(ValueError, match="own has no probes of strangers"):
        run(replace(own, probes={"near": near}), {"f": fnet}, {}, tasks=("open_set",))


def test_results_tell_all_and_round_trip_and_compare(data, fnet, srnets, tmp_path):
    found = run(data, {"f": fnet}, srnets, seed=7)
    about = found.run
    assert (about["protocol"]["name"], about["seed"], about["skip_missing"]) == ("paper", 7, False)
    assert about["sizes"] == {"verification": [list(size) for size in SIZES]}
    assert set(about["networks"]) == {"f", *srnets}
    assert all(len(net["weights"]) == 64 for net in about["networks"].values())
    assert len(about["data"]["list"]) == len(about["data"]["content"]["verification"]) == 64
    found.save(tmp_path / "a.json")
    assert Results.load(tmp_path / "a.json").run == json.loads(json.dumps(found.run))
    text = comparison_table(compare(tmp_path / "a.json", found, srnets=("bicubic", "tiny")))
    assert text.count("McNemar") == len(SIZES)
    other = run(data, {"f": fnet}, srnets, probe="both", seed=7)
    for method, size, alike in ((HR, (112, 96), True), ("tiny", SIZES[0], False)):
        both = [scores(one, "f", method, size) for one in (other, found)]
        assert np.array_equal(*both) == alike
    with pytest.raises(ValueError, match="differ"):
        compare(found, other)
    many = run(data, {"f": fnet}, srnets, tasks=("verification", "open_set"), draws=2)
    assert {one.cell_a.task for one in compare(found, many)} == {"verification"}
    other = run(data, {"f": fnet}, srnets, tasks=("open_set",), draws=2, seed=1)
    with pytest.raises(ValueError, match="the gallery draws of the runs differ"):
        compare(many, other)
    assert {one.test for one in compare(many, many)} == {"McNemar, exact", "paired t"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "papr"}, "paper"),
        ({"tasks": ("verify",)}, "verification"),
        ({"probe": "first"}, "second"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
        ({"device": "gpu"}, "device 'gpu' cannot be used"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"sizes": [(112, 112)]}, "112x112 is no smaller version of the 112x96 crop"),
        ({"sizes": [(224, 192)]}, "224x192 is no smaller version"),
        ({"sizes": [(0, 6)]}, "0x6 is no smaller version"),
        ({"sizes": [(7, -6)]}, "7x-6 is no smaller version"),
        ({"srnets": {"hr": None}}, "cannot be called 'hr'"),
        ({"srnets": {"lr": None}}, "cannot be called 'lr'"),
        ({"srnets": {"f": None}}, "'f' is both"),
        ({"fnets": {}}, "no FNet to measure"),
    ],
)
def test_what_makes_no_sense_is_told(data, fnet, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(data, **{"fnets": {"f": fnet}, "srnets": {}, "device": "cpu", **options})


def test_pairs_that_cannot_be_judged_cost_no_time(data, fnet, calls):
    second = ~data.pairs.same | (data.pairs.fold == 0)
    for keep, message in (
        (data.pairs.fold == 0, "drawn: 8 pairs in 1 folds"),
        (second, "drawn: fold 2 of 2 has 0 pairs of one person and 4 of two"),
        (torch.zeros(16, dtype=torch.bool), "drawn: 0 pairs in 0 folds"),
    ):
        with pytest.raises(ValueError, match=message):
            run(replace(data, pairs=data.pairs.select(keep)), {"f": fnet}, {})
    assert not calls


@pytest.mark.parametrize("photos", [False, True])
def test_borders_that_would_be_made_up_are_told(data, fnet, tmp_path, photos):
    """A wide-crop FNet on aligned crops, or on what an SRNet makes of narrow ones."""
    fnet.crop, wide = "ffhq", create_srnet("bicubic", crop="ffhq")
    srnets = {"narrow": create_srnet("bicubic"), "wide": wide}
    data = open_evaluation(mini_lfw(tmp_path, people=4, photos=3)) if photos else data
    with pytest.warns(UserWarning, match="holds") as told:
        run(data, {"f": fnet}, srnets, cache=False)
    with pytest.warns(UserWarning, match="holds"):
        write_sheets(tmp_path, data, {"f": fnet}, srnets, [(14, 12)], count=1, device="cpu")
    said = [str(one.message) for one in told if "holds" in str(one.message)]
    assert any("of which crop=sphereface holds 48%" in one for one in said)
    assert any("wide makes 'ffhq' crops" in one for one in said) is not photos
