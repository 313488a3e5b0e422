import csv
import io
import itertools
import json
import os
import zipfile
from hashlib import sha256

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from idloss.evaluation import results as results_module
from idloss.evaluation.compare import compare, comparison_table
from idloss.evaluation.report import paper_table, write_tables
from idloss.evaluation.results import COLUMNS, HR, Cell, Results
from idloss.evaluation.statistics import estimate, mcnemar

# Table 1 of the paper, SFace
TABLE_1 = {
    "bilinear": (59.03, 82.75, 89.10, 97.60),
    "edsr32_256": (73.42, 92.25, 94.32, 98.48),
    "edsr32_256_id": (84.03, 94.73, 95.10, 98.85),
}
SIZES = ((7, 6), (14, 12), (16, 16), (28, 24))
TWICE = [{"task": "verification", "fnet": "f", "srnet": "x", "height": 7, "width": 6}] * 2
SAME = np.tile(np.repeat([True, False], 300), 10)


def table_run(methods=TABLE_1, seed=0, **run):
    rng = np.random.default_rng(seed)
    results = Results(run={"protocol": "paper", "seed": 0, "data": {"pairs": "abc"}, **run})
    for name, values in methods.items():
        for size, value in zip(SIZES, values, strict=True):
            figure = estimate(rng.normal(value / 100, 0.01, 10), value / 100)
            arrays = {"same": SAME, "correct": rng.random(6000) < value / 100}
            arrays["scores"] = rng.random(6000, dtype=np.float32)
            results.add(Cell("verification", "sface", name, *size), {"accuracy": figure}, arrays)
    results.add(Cell("verification", "sface", HR, 112, 96), {"accuracy": estimate([0.9907])})
    return results


def identification_run(shift, seed=0):
    rng = np.random.default_rng(seed)
    results = Results()
    for size in ((7, 6), (16, 14), (18, 16)):
        rank1 = 0.3 + shift + 0.01 * rng.standard_normal(10)
        cell = Cell("identification", "sface", "edsr32_256", *size)
        results.add(cell, {"rank1": estimate(rank1)}, {"rank1": rank1})
        tpir = np.stack((rank1 - 0.1, rank1 - 0.2), axis=1)
        cell = Cell("open_set", "sface", "edsr32_256", *size)
        results.add(cell, {"tpir@fpir=0.1": estimate(tpir[:, 0])}, {"tpir": tpir})
    return results


@pytest.fixture
def saved(tmp_path):
    """The JSON and the arrays of a run on disk."""
    main, _, sidecar = table_run().save(tmp_path / "run")
    return main, sidecar


def test_results_survive_the_disk(tmp_path):
    results = table_run()
    files = results.save(tmp_path / "new" / "run")
    assert [file.name for file in files] == ["run.json", "run.csv", "run.npz"]
    assert {*files[0].parent.iterdir()} == {*files}
    again = Results.load(files[0])
    for kept in ("run", "environment", "created"):
        assert getattr(again, kept) == getattr(results, kept)
    assert all(again.environment[key] for key in ("packages", "cores", "processor"))
    assert again.records[:-1] == results.records[:-1]
    assert np.isnan(again.records[-1].estimate.low)  # HR: one repeat has no interval
    assert list(again.arrays) == list(results.arrays)
    for cell, arrays in results.arrays.items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(again.arrays[cell][name], array, strict=True)
    for file in files:
        file.rename(tmp_path / f"other{file.suffix}")
    assert Results.load(tmp_path / "other.json").arrays


@pytest.mark.parametrize("name", ["sface", "=1+1", "+1", "-1", "@SUM(A1)"])
def test_csv_is_tidy_and_holds_no_formula(name):
    results = table_run()
    results.add(Cell("verification", name, name, 7, 6), {"accuracy": estimate([0.5])})
    rows = list(csv.DictReader(io.StringIO(results.to_csv())))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 14
    assert (rows[0]["srnet"], rows[0]["height"], rows[0]["width"]) == ("bilinear", "7", "6")
    assert float(rows[0]["value"]) == pytest.approx(0.5903)
    assert (rows[-2]["srnet"], rows[-2]["low"]) == ("hr", "")
    assert rows[-1]["fnet"] == rows[-1]["srnet"] == ("" if name == "sface" else "'") + name


def change(**values):
    return lambda document: document | values


def change_row(**values):
    """Change the first row; () takes a column away."""

    def changed(document):
        first, *others = document["records"]
        row = {key: value for key, value in (first | values).items() if value != ()}
        return document | {"records": [row, *others]}

    return changed


@pytest.mark.parametrize(
    ("hostile", "says"),
    [
        (lambda document: [document], "schema None"),
        (change(schema=99), "schema 99"),
        (change(schema={"a": "b" * 999}), "schema"),
        (change(run=None), "'run' is 'None', no dict"),
        (change(created=5), "'created' is '5', no str"),
        (change(records={"a": 1}), "'records' is .* no list"),
        (change(records=[[1, 2]]), "a row is"),
        (change(arrays=[]), "'arrays' is"),
        (change(arrays={"cells": [3], "file": "run.npz", "sha256": ""}), "damaged"),
        (change(arrays={"cells": [], "file": None, "sha256": ""}), "'file' is 'None', no str"),
        (change(arrays={"cells": [], "file": "../run.npz", "sha256": ""}), "is not the file"),
        (change_row(metric=()), "a row is .*metric"),
        (change_row(extra=1), "a row is .*metric"),
        (change_row(value="0.9"), "'value' is '0.9', no number"),
        (change_row(value=None), "'value' is 'None', no number"),
        (change_row(value=1e999), "it holds Infinity"),
        (change_row(mean=float("nan")), "it holds NaN"),
        (change_row(repeats=True), "'repeats' is 'True', no number"),
        (change_row(value=10**400), "too large"),
        (change_row(height=True), "whole rows and columns, got True"),
        (change_row(task="v" * 9999), "unknown task 'v"),
        (change_row(fnet="f" * 9999), "cannot be the name of an FNet"),
        (change(arrays={"cells": [], "file": "a" * 9999, "sha256": ""}), "is not the file"),
        (change(arrays={"cells": TWICE, "file": "run.npz", "sha256": ""}), "stands there twice"),
        (change_row(height=-1), "whole rows and columns, got -1"),
        (change_row(height="7"), "whole rows and columns, got '7'"),
        (change_row(task="verify"), "unknown task 'verify'.*verification"),
        (change_row(fnet=["sface"]), "cannot be the name of an FNet"),
        (change_row(srnet="a\nb | 99.9 |"), "cannot be the name of an SRNet"),
        (change_row(metric="\x1b]0;owned\x07"), "cannot be the name of a metric"),
        (lambda document: document | {"records": document["records"][:1] * 2}, "twice"),
    ],
)
def test_damaged_and_hostile_results_are_told_in_one_line(saved, hostile, says):
    main, _ = saved
    main.write_text(json.dumps(hostile(json.loads(main.read_text()))))
    with pytest.raises(ValueError, match=says) as caught:
        Results.load(main)
    told = str(caught.value)
    assert "run." in told
    assert told.isprintable()
    assert len(told) < 600


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"schema": ', "PK\x03\x04"])
def test_what_is_no_result_file_is_refused(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json is not a result file"):
        Results.load(tmp_path / "run.json")
    with pytest.raises(FileNotFoundError, match=r"no result file at .*gone\.json"):
        Results.load(tmp_path / "gone.json")


class Owned:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of a result file was run')",)


def packed(**arrays):
    blob = io.BytesIO()
    np.savez_compressed(blob, **arrays)
    return blob.getvalue()


def zipped(name, content):
    blob = io.BytesIO()
    with zipfile.ZipFile(blob, "w") as archive:
        archive.writestr(name, content)
    return blob.getvalue()


def claiming(shape):
    """An array without content whose header claims a shape."""
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return zipped("0/same.npy", b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header)


@pytest.mark.parametrize(
    ("sidecar", "says"),
    [
        (b"", ""),
        (b"PK\x03\x04 no archive", ""),
        (packed(**{"99/same": SAME}), "99"),
        (packed(**{"-1/same": SAME}), "-1"),
        (packed(**{"0/same": np.array([Owned()], dtype=object)}), "allow_pickle=False"),
        (packed(**{"0/same": np.zeros(1 << 23, dtype=np.uint8)}), r"unpack to 8,388,\d+"),
        (packed(**{"0/same": np.array(["yes"])}), "'0/same' is no array of numbers"),
        (zipped("0/same.npy", "no array"), "'0/same' is no array of numbers"),
        (zipped("0/s\x1b[2J.npy", "no array"), r"'0/s\\x1b\[2J' is no array of numbers"),
        (claiming(f"({10**12},)"), ""),
        (claiming(f"({10**30},)"), ""),
    ],
    ids=itertools.count(),  # the bytes hold the time
)
def test_hostile_arrays_are_refused(saved, monkeypatch, sidecar, says):
    monkeypatch.setattr(results_module, "_MOST_BYTES", 1 << 20)
    main, file = saved
    pin = sha256(file.read_bytes()).hexdigest()
    file.write_bytes(sidecar)
    with pytest.raises(ValueError, match=r"run\.npz is not the file that run\.json was writ"):
        Results.load(main)
    main.write_text(main.read_text().replace(pin, sha256(sidecar).hexdigest()))
    with pytest.raises(ValueError, match=rf"run\.npz is damaged: .*{says}"):
        Results.load(main)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"needs run\.npz beside it"):
        Results.load(main)
    for large in (file, main):
        large.touch()
        os.truncate(large, 1 << 33)  # holds nothing, but claims to
        with pytest.raises(ValueError, match=rf"{large.name} has 8,589,934,592 bytes, a run at m"):
            Results.load(main)


def test_arrays_of_older_numpy_are_read(saved):
    """numpy before 2.2 wrote the argument allow_pickle as one more array."""
    main, file = saved
    pin = sha256(file.read_bytes()).hexdigest()
    with np.load(file) as stored:
        file.write_bytes(packed(allow_pickled=np.array(False), **stored))
    main.write_text(main.read_text().replace(pin, sha256(file.read_bytes()).hexdigest()))
    for cell, arrays in Results.load(main).arrays.items():
        assert set(arrays) == {"same", "correct", "scores"}, cell


@pytest.mark.parametrize("name", ["", " ", "a\nb", "a\r", "\x1b[2J", "\u202egnp", 'a"\t"', None])
def test_names_that_would_forge_tables_are_refused(name):
    for names in ((name, "bicubic"), ("sface", name)):
        with pytest.raises(ValueError, match=r"cannot be the name of an .*use printable letters"):
            Cell("verification", *names, 7, 6)
    Cell("open-set", 'a, "b" | =c\\', "\u6c49", 7, 6)  # odd, but harmless


def test_failed_save_leaves_the_old_files_and_keeps_the_new(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    results = table_run(seed=1)
    results.save(folder / "run")
    before = {file: file.read_bytes() for file in folder.iterdir()}
    results.run["not plain"] = object()
    with pytest.raises(TypeError):
        results.save(folder / "run")
    results.run["not plain"] = "plain"
    full, whole = [".npz"], results_module.written_whole

    def refuse(target):
        if target.suffix in full and folder in target.parents:
            raise OSError(28, "No space left on device")
        return whole(target)

    monkeypatch.setattr(results_module, "written_whole", refuse)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(OSError, match=r"run\.json, .*out \(No space left on device\)") as caught:
        results.save(folder / "run")
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    (kept,) = tmp_path.glob("idloss-results-*/run.json")
    assert str(kept.parent) in str(caught.value)
    assert Results.load(kept).run["not plain"]
    full.append(".md")
    with pytest.raises(OSError, match=r"table1\.md cannot be written to .*another folder"):
        write_tables(results, folder)


def test_a_cell_is_measured_once():
    results = table_run()
    with pytest.raises(ValueError, match="verification sface \\+ bilinear at 7x6 already"):
        results.add(Cell("verification", "sface", "bilinear", 7, 6), {"accuracy": estimate([1])})
    assert results.value(Cell("verification", "sface", HR, 112, 96), "accuracy") == 0.9907
    with pytest.raises(KeyError, match="no eer for"):
        results.value(Cell("verification", "sface", HR, 112, 96), "eer")


def test_tables_have_the_papers_layout():
    assert paper_table(table_run()).replace("\N{MULTIPLICATION SIGN}", "x") == (
        "| FNet  | Method/SRNet  | 7x6       | 14x12 (16x16)         | 28x24     | 112x96 |\n"
        "| ----- | ------------- | --------: | --------------------: | --------: | -----: |\n"
        "| sface | bilinear      | 59.03     | 82.75 (89.10)         | 97.60     | 99.07  |\n"
        "|       | edsr32_256    | 73.42     | 92.25 (94.32)         | 98.48     |        |\n"
        "|       | edsr32_256_id | **84.03** | **94.73** (**95.10**) | **98.85** |        |\n"
    )
    for task in ("identification", "open-set"):
        head, _, row = paper_table(identification_run(0), task, deviation=True).splitlines()
        sizes = [f"{h}\N{MULTIPLICATION SIGN}{w}" for h, w in ((7, 6), (16, 14), (18, 16))]
        assert [cell.strip() for cell in head.split("|")[3:-1]] == sizes
        assert "±" in row


def test_table_shows_what_is_missing():
    results = table_run({"bilinear": TABLE_1["bilinear"]})
    results.add(Cell("verification", "vgg_face", "tdae", 16, 16), {"accuracy": estimate([0.7367])})
    last = paper_table(results).splitlines()[-1]
    assert [cell.strip() for cell in last.split("|")[1:-1]] == [
        *("vgg_face", "tdae", "-", "- (73.67)", "-", "")
    ]
    with pytest.raises(ValueError, match="no open_set results"):
        paper_table(results, "open_set")
    with pytest.raises(ValueError, match="no 'eer' for verification; it has accuracy"):
        paper_table(results, metric="eer")


def test_compare_pairs_two_runs_by_cell(tmp_path):
    first, second = table_run(seed=0), table_run(seed=1)
    files = [run.save(tmp_path / name)[0] for name, run in (("a", first), ("b", second))]
    names = {cell for cell in first.cells() if cell.srnet != HR}
    # HR holds no scores here: that is said, not skipped in silence
    with pytest.raises(
        ValueError, match=r"no 'same' for verification sface \+ hr at 112x96, but none; evaluate it"
    ):
        compare(*files)
    for run in (first, second):
        run.records = [record for record in run.records if record.cell.srnet != HR]
    found = compare(first, second)
    assert {one.cell_a for one in found} == {one.cell_b for one in found} == names
    for one in found:
        a, b = (run.arrays[one.cell_a]["correct"] for run in (first, second))
        assert (one.wins_a, one.wins_b, one.p) == mcnemar(a, b)
    corrected = multipletests([one.p for one in found], method="holm")[1]
    np.testing.assert_allclose([one.p_holm for one in found], corrected)


def test_compare_pairs_srnets():
    run = table_run()
    found = compare(run, run, srnets=("edsr32_256", "edsr32_256_id"))
    assert [one.cell_a.size for one in found] == ["7x6", "14x12", "16x16", "28x24"]
    assert all(one.cell_b.srnet == "edsr32_256_id" for one in found)
    assert found[0].difference == pytest.approx(0.1061)
    assert found[0].p < 1e-20
    _, _, first, *others = comparison_table(found).splitlines()
    assert "verification sface + edsr32_256 at 7x6 → edsr32_256_id" in first
    assert "+10.61" in first
    assert len(others) == 3
    alone = (table_run({name: TABLE_1[name]}) for name in ("edsr32_256", "edsr32_256_id"))
    assert [one.cell_b.srnet for one in compare(*alone)] == ["edsr32_256_id"] * 4


def test_compare_tests_identification_over_draws():
    first, second = identification_run(0), identification_run(0.05, seed=1)
    found = {one.cell_a: one for one in compare(first, second)}
    assert len(found) == 6
    for cell, one in found.items():
        closed = cell.task == "identification"
        a, b = (run.arrays[cell]["rank1" if closed else "tpir"] for run in (first, second))
        a, b = (x if x.ndim == 1 else x[:, 0] for x in (a, b))
        assert one.p == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-9)
        wins = (b > a).sum()
        assert one.p_sign == pytest.approx(stats.binomtest(wins, 10).pvalue)
        assert one.metric == ("rank1" if closed else "tpir@fpir=0.1")


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"protocol": "standard"}, "the protocol of the runs differ.*paper.*standard"),
        ({"data": {"pairs": "xyz"}}, "the data sets of the runs differ"),
        ({"data": None}, "second run does not state the data sets"),
        ({"protocol": None}, "second run does not state the protocol"),
        ({"draws": 5}, "first run does not state the gallery draws"),
        ({"probe": "both"}, "first run does not state which faces are LR"),
    ],
)
def test_runs_that_cannot_be_paired_are_refused(other, says):
    with pytest.raises(ValueError, match=says):
        compare(table_run(), table_run(**other))


@pytest.mark.parametrize("name", ["LFW\x1b[2J", None, {"name": "LFW\nforged"}, 5])
def test_tables_of_any_run_are_fit_for_a_terminal(tmp_path, name):
    results = table_run(data=name, protocol=name)
    (text,) = write_tables(results, tmp_path).values()
    assert len(text.splitlines()) == 7
    assert text.replace("\n", "").isprintable()


def test_other_pairs_are_refused():
    first, second = (table_run({"bilinear": TABLE_1["bilinear"]}) for _ in range(2))
    for arrays in second.arrays.values():
        arrays["same"] = ~SAME
    with pytest.raises(ValueError, match="the runs hold other pairs"):
        compare(first, second)
    with pytest.raises(ValueError, match="share no cell for bilinear against x"):
        compare(first, second, srnets=("bilinear", "x"))
    for arrays in second.arrays.values():
        arrays["same"] = SAME
        arrays["correct"] = arrays["correct"][:5]
    with pytest.raises(ValueError, match="'correct' and 'same' hold different numbers of pairs"):
        compare(second, second)
    for arrays in second.arrays.values():
        del arrays["correct"]
    with pytest.raises(ValueError, match=r"holds no 'correct' for .*, but same, scores; evaluate"):
        compare(first, second)
