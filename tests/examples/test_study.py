"""The study on a few real photos: two variants, two seeds, a real judge; and once more."""

import csv
import itertools
from types import SimpleNamespace

import torch
import yaml

from idloss.data import draw_faces, folder_faces, prepare


def test_people_held_out_are_those_with_five_photos(example):
    faces = draw_faces(12, 6)
    faces.labels[:3] = -1  # the first person has three left
    test = example("study").hold_out(faces, 4, 40, seed=0)
    assert len(test.faces.identities) == 4
    assert test.faces.identities[0] != faces.identities[0]
    assert torch.bincount(test.faces.labels).tolist() == [6] * 4
    assert len(test.pairs) == 40


def test_a_share_of_the_people_is_trained_on(example):
    faces, script = draw_faces(12, 6), example("study")
    held = script.hold_out(faces, 2, 20, seed=0).faces
    everybody = set(faces.identities)
    assert set(script.others(faces, held, 1)) == set(held.identities)
    few, more = (everybody - set(script.others(faces, held, share)) for share in (0.2, 0.5))
    assert (len(few), len(more)) == (2, 5)
    assert few < more < everybody - set(held.identities)


def test_each_variant_is_trained_judged_and_taken_up_again(example, photos, shared, tmp_path):
    folder = photos(48)
    lines = (folder / "landmarks.csv").read_text().splitlines()
    people = [f"{line.rpartition(',')[0]},{place % 8}" for place, line in enumerate(lines[1:])]
    (folder / "landmarks.csv").write_text("\n".join([lines[0], *people]))
    prepare(folder_faces(folder), tmp_path / "faces")
    judge = f"local-dir:{shared('weights/edgeface_xxs')}"
    study = {
        "recipe": "paper_edsr16_64_id",
        "fields": [
            *(f"fnet={judge}", "iterations=2", "batch_size=4", "trackers=[]", "device=cpu"),
            "srnet_options={depth: 1, width: 8}",
        ],
        "sizes": ["7x6"],
        "judges": {"edgeface": judge},
        "variants": {"without": ["identity_weight=0"], "with": ["identity_weight=0.5"]},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    options = SimpleNamespace(
        faces=tmp_path / "faces", study=tmp_path / "study.yaml", fields=[], seed=[0, 1], people=2
    )
    options.pairs, options.device, options.out, options.test = 20, "cpu", tmp_path, None
    script = example("study")
    script.main(options)
    first = (tmp_path / "study.csv").read_text()
    rows = list(csv.DictReader(first.splitlines()))
    assert [(row["variant"], row["seed"]) for row in rows] == [
        (variant, seed) for seed in "01" for variant in ("without", "with")
    ]
    assert {row["size"] for row in rows} == {"7x6"}
    assert [float(row["over_first"]) == 0 for row in rows[::2]] == [True, True]
    for run in ("without_0", "with_1"):
        recipe = yaml.safe_load((tmp_path / run / "recipe.yaml").read_text())
        assert len(recipe["exclude"]) == 2
        assert recipe["seed"] == int(run[-1])
    script.main(options)  # finds the networks and judges them alike
    assert (tmp_path / "study.csv").read_text() == first
    named = [line.partition(",")[0] for line in lines[1:21]]
    pairs = [f"{a},{b},{place % 2}" for place, (a, b) in enumerate(itertools.pairwise(named))]
    (folder / "pairs.csv").write_text("\n".join(["first,second,same", *pairs]))
    options.test, options.seed = folder / "pairs.csv", [1]
    script.main(options)
    tested = list(csv.DictReader((tmp_path / "test.csv").read_text().splitlines()))
    # the same networks, other pairs
    assert [row["grid"] for row in tested] == [row["grid"] for row in rows[2:]]
    assert [row["auc"] for row in tested] != [row["auc"] for row in rows[2:]]
