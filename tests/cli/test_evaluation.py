"""`idloss evaluate` and `idloss compare`, as a person types them."""

import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import warnings

import numpy as np
import pytest
from minilfw import face_like
from PIL import Image

from idloss.data import draw_faces
from idloss.evaluation import Results


def test_evaluate_from_end_to_end(lfw, networks, command, tmp_path, capsys):
    out = tmp_path / "out"
    words = [lfw, "--fnet", networks[0], "--srnet", "bicubic", "--srnet", networks[1]]
    words += ["--size", "7x6", "--size", "14x12", "--task", "verification"]
    words += ["--task", "identification", "--task", "open-set", "--draws", 2, "--faces", 2]
    assert not command("evaluate", *words, "--out", out)
    shown = capsys.readouterr().out
    assert "| FNet" in shown
    assert "| ours" in shown
    results = Results.load(out / "results.json")
    assert len(results.cells()) == 3 * (1 + 2 * 2)
    assert results.run["command"][:2] == ["idloss", "evaluate"]
    assert results.run["sizes"]["identification"] == [[7, 6], [14, 12]]
    captions = {
        "table1": "Verification accuracy (%)",
        "table2": "Rank-1 identification rate (%), mean ± deviation of 2 draws",
        "open_set": "TPIR@FPIR 0.1 (%), mean ± deviation of 2 draws",
    }
    for name, caption in captions.items():
        table = (out / f"{name}.md").read_text()
        assert table in shown
        assert table.startswith(f"{caption}: lfw, protocol paper\n\n| FNet")
        assert ("±" in table.partition("\n")[2]) == (name != "table1")
    made = {path.name for path in (out / "figures").iterdir()}
    for stem in ("table1-by-size", "roc-f-7x6", "similarity-f-14x12", "cmc-f-7x6", "faces-7x6"):
        assert {f"{stem}.png", f"{stem}.pdf"} <= made, made
        assert (out / "figures" / f"{stem}.png").stat().st_size > 5_000
    main = out / "results.json"
    told = command("compare", main, tmp_path / "no.json")
    assert told == f"idloss: no result file at {tmp_path / 'no.json'}; give the .json of a run"
    told = command("compare", main, main, "--srnets", "x", "ours")
    assert told.endswith("Name two SRNets to compare with srnets= or --srnets A B")
    assert not command("compare", main, main, "--srnets", "bicubic", "ours")
    compared = capsys.readouterr().out
    assert compared.count("→ ours") == 6
    assert "McNemar" in compared


def test_standard_protocol_and_single_sizes(lfw, networks, command, tmp_path):
    out = tmp_path / "out"
    words = ["--fnet", networks[0], "--srnet", "bilinear", "--size", "14x12", "--no-figures"]
    words += ["--protocol", "standard", "--probe", "both", "--no-cache", "--out", out]
    assert not command("evaluate", lfw, *words)
    assert Results.load(out / "results.json").run["protocol"]["name"] == "standard"
    assert not (out / "figures").exists()
    assert not (tmp_path / "hf").exists()


def test_hr_alone(lfw, networks, command, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--fnet", networks[0], "--size", "hr", "--out", out, "--faces", 1]
    assert not command("evaluate", lfw, *words)
    results = Results.load(out / "results.json")
    (cell,) = results.cells()
    assert (cell.srnet, cell.height, cell.width) == ("hr", 112, 96)
    assert f"{100 * results.value(cell, 'accuracy'):.2f} " in capsys.readouterr().out


def half_a_photo(folder):
    photo = folder / "lfw/Person_1/Person_1_0002.jpg"
    photo.write_bytes(photo.read_bytes()[:700])


def half_an_archive(folder):
    with tarfile.open(folder / "lfw.tgz", "w:gz") as archive:
        archive.add(folder / "lfw", "lfw")
    shutil.rmtree(folder / "lfw")
    whole = (folder / "lfw.tgz").read_bytes()
    (folder / "lfw.tgz").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (half_a_photo, r"Person_1_0002\.jpg: unreadable image"),
        (half_an_archive, r"lfw\.tgz: the gzip stream is damaged or cut short"),
        (
            lambda folder: (folder / "pairs.txt").write_text("\n\n"),
            r"pairs\.txt: the file is empty",
        ),
        (lambda folder: (folder / "lfw_landmarks.csv").unlink(), r"no landmarks .* --landmarks"),
    ],
)
def test_data_errors_are_a_few_lines(change, said, lfw, networks, command, tmp_path):
    change(shutil.copytree(lfw, place := tmp_path / "edited"))
    words = ["--fnet", networks[0], "--size", "7x6", "--no-figures", "--out", tmp_path / "out"]
    error = command("evaluate", place, *words)
    assert re.search(said, error)
    assert error.count("\n") <= 11  # ten faults, each on its line, and what to do
    assert "Traceback" not in error
    assert "skip_missing" not in error


def test_skip_missing_goes_on_and_is_recorded(lfw, networks, command, tmp_path, capsys):
    half_a_photo(shutil.copytree(lfw, place := tmp_path / "edited"))
    words = ["--fnet", networks[0], "--srnet", "bilinear", "--size", "7x6", "--no-figures"]
    words += ["--cache-folder", tmp_path / "mine"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert not command("evaluate", place, *words, "--skip-missing", "--out", tmp_path / "out")
    assert "idloss: warning: left out:" in capsys.readouterr().err
    run_data = Results.load(tmp_path / "out/results.json").run["data"]
    assert [fault for fault in run_data["skipped"] if "Person_1_0002.jpg" in fault]
    assert [*(tmp_path / "mine").rglob("*.safetensors")]


def test_pairs_csv_and_bin(networks, command, tmp_path):
    files = []
    crops = draw_faces(4, 10, crop="arcface", size=(112, 112)).crops
    for index, crop in enumerate(crops):
        stream = io.BytesIO()
        Image.fromarray(face_like(crop)).save(stream, "PNG")
        files.append(stream.getvalue())
        (tmp_path / f"{index}.png").write_bytes(stream.getvalue())
    pairs = [(20 * p + k, 20 * p + (k + 1) % 10 + 10 * d, 1 - d) for p in (0, 1) for k in range(10)
             for d in (0, 1)]  # fmt: skip
    table = "first,second,same\n" + "".join(f"{a}.png,{b}.png,{s}\n" for a, b, s in pairs)
    (tmp_path / "pairs.csv").write_text(table)
    pictures = [files[place] for a, b, _ in pairs for place in (a, b)]
    content = (pictures, [bool(same) for _, _, same in pairs])
    (tmp_path / "set.bin").write_bytes(pickle.dumps(content))
    words = ["--fnet", networks[0], "--srnet", "bilinear", "--size", "14x12", "--no-figures"]
    for data, more in (("pairs.csv", ["--crop", "arcface"]), ("set.bin", [])):
        out = tmp_path / data.partition(".")[0]
        assert not command("evaluate", tmp_path / data, *words, *more, "--out", out)
    scores = [
        next(iter(Results.load(tmp_path / name / "results.json").arrays.values()))["scores"]
        for name in ("pairs", "set")
    ]
    np.testing.assert_array_equal(*scores)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--protocol", "papper"], "unknown protocol 'papper'.*paper"),
        (["--size", "7,6"], "--size '7,6' is not rows x columns"),
        (["--size", "0x6"], "--size '0x6' is not rows x columns"),
        (["--size", "7x6", "--size", "7\N{MULTIPLICATION SIGN}6"], "given twice"),
        (["--fnet", "mobilfacenet"], "mobilefacenet"),
        (["--srnet", "bicubic", "--srnet", "bicubic"], "--srnet 'bicubic' is given twice"),
        (["--data-set", "lwf"], "lfw"),
        (["--data-set", "bin", "--people", "x"], "'bin' takes no --people"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    ],
)
def test_wrong_words_are_one_line(words, said, lfw, networks, command, tmp_path):
    fnet = [] if "--fnet" in words else ["--fnet", networks[0]]
    error = command("evaluate", lfw, *fnet, *words, "--out", tmp_path / "out")
    assert re.search(said, error, re.IGNORECASE), error
    assert "\n" not in error


def test_results_that_cannot_be_written_are_told_first(command, tmp_path):
    (tmp_path / "file").write_text("")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    for place, said in (("file", "file is a file"), ("file/x", "file is a file"),
                        ("closed/out", "closed may not be written to")):  # fmt: skip
        if said.startswith("file") or not os.access(closed, os.W_OK):  # root writes anywhere
            error = command("evaluate", tmp_path / "no data", "--out", tmp_path / place)
            assert re.search(rf"--out .*{said}; name another folder", error), error


def test_cache_is_found_by_another_process(networks):
    """Keys hold no address and no hash that differs from one process to the next."""
    code = f"""
import torch
from idloss import create_fnet, create_srnet
from idloss.evaluation import Cell, get_protocol
from idloss.evaluation.embedding import cell_keys, ready
f = create_fnet({networks[0][2:]!r}, pretrained=True)
s = create_srnet({networks[1][5:]!r}, pretrained=True)
cells = [Cell("verification", "f", one, 7, 6) for one in ("hr", "s")]
with ready({{"f": f}}, {{"s": s}}, get_protocol("paper"), torch.device("cpu")) as networks:
    keys = list(cell_keys(networks, cells).values())
"""
    here: dict[str, object] = {}
    exec(code, here)
    words = [sys.executable, "-c", f"{code}print('keys', *keys)"]
    there = subprocess.run(words, capture_output=True, text=True, check=True)
    assert there.stdout.split("keys ")[1].split() == here["keys"]
    assert len(set(here["keys"])) == 2
