import os

import pytest
from PIL import Image

from idloss.data import pictures
from idloss.data.files import DataError
from idloss.data.pictures import find_pictures, read_photo


def found(*paths, **options):
    faults = []
    names = [str(path) for path in find_pictures([*map(str, paths)], faults, **options)]
    return names, faults


@pytest.fixture
def folder(tmp_path):
    """Pictures at the top, in a folder and in one that is to be left out, and what is none."""
    top = tmp_path / "top"
    for name in ("a.png", "B.JPG", "notes.txt", "deep/a.png", "out/a.png", "new\nline \x1b[2J.png"):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(b"")
    return top


def test_each_picture_once_however_many_ways_lead_to_it(folder, monkeypatch):
    (folder / "again").symlink_to(folder)
    (folder / "deep" / "up").symlink_to("..")
    (folder / "round").symlink_to("round")
    wanted = {str(folder / name) for name in ("B.JPG", "deep/a.png", "new\nline \x1b[2J.png")}
    ways = (folder / "a.png", folder, folder / "deep", folder / "deep" / "a.png")
    names, faults = found(*ways, folder / "notes.txt", without=folder / "out")
    assert len(names) == len(set(names)) == 5
    assert set(names) == wanted | {str(folder / "a.png"), str(folder / "notes.txt")}
    assert not faults
    monkeypatch.chdir(folder)
    assert sorted(found("*.png", "a.png", "./a.png")[0]) == ["a.png", "new\nline \x1b[2J.png"]


def test_links_that_fork_at_each_level_end(tmp_path):
    """Two to the power of 40 paths lead to the picture at the end."""
    for level in range(40):
        (tmp_path / f"{level}").mkdir()
        for side in "ab":
            (tmp_path / f"{level}" / side).symlink_to(f"../{level + 1}")
    (tmp_path / "40").mkdir()
    (tmp_path / "40" / "a.png").write_bytes(b"")
    assert len(found(tmp_path / "0")[0]) == 1


def test_deep_folders_and_large_ones_are_no_burden(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    for _ in range(1500):  # deeper than Python's stack; a path of 3,000 letters
        os.mkdir("d")  # noqa: PTH102
        os.chdir("d")
    try:
        assert len(found(tmp_path)[0]) == 1
    finally:  # what removes temporary folders may go no deeper than the stack
        for _ in range(1500):
            os.chdir("..")
            os.rmdir("d")  # noqa: PTH106
    listed = []

    class Counting:
        def __init__(self, entries):
            self.entries = entries

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.entries.close()

        def __iter__(self):
            for entry in self.entries:
                listed.append(entry.name)
                yield entry

    many = tmp_path / "many"
    many.mkdir()
    for place in range(50):
        (many / f"{place}.png").write_bytes(b"")
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: Counting(scan(path)))
    next(find_pictures([str(many)], []))
    assert len(listed) == 1


def test_what_cannot_be_listed_or_is_not_there_is_told(folder, monkeypatch):
    scan = os.scandir

    def refused(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    names, faults = found(folder, folder / "gone.png", folder / "*.webp")
    assert len(names) == 4
    assert [fault.what for fault in faults] == [
        "cannot be listed (Permission denied)",
        "there is no such file or folder",
        "there is no such file or folder",
    ]


def test_what_is_no_picture_file_is_refused_before_it_is_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "waits.png")  # reading it would wait for ever
    (tmp_path / "circle.png").symlink_to("circle.png")
    (tmp_path / "gone.png").symlink_to("nowhere")
    with (tmp_path / "hole.png").open("wb") as file:
        file.truncate(1 << 40)
    for name, said in (
        ("waits", "no regular file"),
        ("circle", "symbolic links"),
        ("gone", "No such file"),
        ("hole", "larger than a picture can be"),
    ):
        with pytest.raises(DataError, match=rf"{name}\.png: .*{said}"):
            read_photo(tmp_path / f"{name}.png")
    Image.new("RGB", (5, 4), "red").save(tmp_path / "a.png")
    assert read_photo(tmp_path / "a.png").shape == (3, 4, 5)
    monkeypatch.setattr(pictures, "MOST_BYTES", 9)
    with pytest.raises(DataError, match="larger"):
        read_photo(tmp_path / "a.png")
