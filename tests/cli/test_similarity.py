"""`idloss ids`, as a person types it."""

import csv

import numpy as np
from PIL import Image

from idloss.data import draw_faces


def test_ids_prints_mean_deviation_and_writes_a_table(fnet, command, tmp_path, capsys):
    for folder, seed in (("restored", 1), ("references", 2)):
        (tmp_path / folder).mkdir()
        crops = draw_faces(3, 1, seed=seed).crops
        for index, crop in enumerate(crops):
            Image.fromarray(crop.permute(1, 2, 0).numpy()).save(tmp_path / folder / f"{index}.png")
    words = ["ids", tmp_path / "restored", tmp_path / "references", "--fnet", fnet]
    table = tmp_path / "new" / "ids.csv"
    assert not command(*words, "--table", table, "--device", "cpu")
    shown = capsys.readouterr().out
    with table.open(newline="") as file:
        rows = [(row["picture"], float(row["similarity"])) for row in csv.DictReader(file)]
    assert [name for name, _ in rows] == ["0.png", "1.png", "2.png"]
    values = [value for _, value in rows]
    assert f"IDS {np.mean(values):.4f}, deviation {np.std(values):.4f}" in shown
    assert "3 pictures" in shown
    assert "crop=sphereface" in shown
    (tmp_path / "references" / "1.png").unlink()
    error = command(*words)
    assert "1.png: has no reference" in error
    assert "--skip-missing" in error
    assert command(*words, "--crop", "spherface").startswith("idloss: unknown template 'spherface'")
