"""Files out of folders and archives, and image decoding, against cv2 and the golden faces."""

import io
import multiprocessing
import pickle
import tarfile
import threading

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from idloss.data.faces import decode_image
from idloss.data.files import (
    DataError,
    Fault,
    FolderFiles,
    MemoryFiles,
    TarFiles,
    describe,
    open_files,
    skip_or_raise,
)

CONTENTS = {f"top/sub{i % 3}/{i:03d}.bin": bytes([i]) * (i * 37 % 1500) for i in range(40)}


@pytest.fixture
def folder(tmp_path):
    for name, data in CONTENTS.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "folder"


@pytest.fixture(params=["tar", "tgz"])
def archive(request, folder, tmp_path):
    path = tmp_path / f"faces.{request.param}"
    with tarfile.open(path, "w:gz" if request.param == "tgz" else "w") as tar:
        tar.add(folder / "top", "top")
    return path


def jpeg(size=(100, 110), seed=0, **options):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def test_folder_and_tar_hold_the_same_files(folder, archive):
    for files in (open_files(folder), open_files(archive)):
        assert set(files.names()) == set(CONTENTS)
        assert {name: files.read(name) for name in CONTENTS} == CONTENTS
        assert sorted(files.names("top/sub1/")) == sorted(n for n in CONTENTS if "sub1" in n)
        assert "top/sub0/000.bin" in files
        assert "top/sub0" not in files
        assert 3 not in files


def test_memory_holds_what_it_was_given():
    files = MemoryFiles("here", CONTENTS)
    assert list(files.names("top/sub2/")) == [n for n in CONTENTS if "sub2" in n]
    with pytest.raises(DataError, match=r"here:nowhere: there is no such file"):
        files.read("nowhere")


def test_missing_member_names_archive_and_member(archive):
    with pytest.raises(DataError, match=rf"{archive.name}:top/none: there is no such file"):
        open_files(archive).read("top/none")


def test_missing_file_names_the_path(folder):
    with pytest.raises(DataError, match=r"folder/top/none: No such file"):
        open_files(folder).read("top/none")


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder and no archive at"):
        open_files(tmp_path / "nothing")


def test_tar_is_shared_by_threads(archive):
    files = open_files(archive)
    wrong = []

    def read():
        wrong.extend(
            name for _ in range(20) for name in CONTENTS if files.read(name) != CONTENTS[name]
        )

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _read_in_child(files, queue):
    queue.put({name: files.read(name) for name in CONTENTS})


def test_tar_goes_to_forked_workers(archive):
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    files = open_files(archive)
    worker = context.Process(target=_read_in_child, args=(files, queue))
    worker.start()
    assert queue.get() == CONTENTS
    worker.join()
    assert files.read("top/sub1/001.bin") == CONTENTS["top/sub1/001.bin"]


def test_tar_pickles_its_index_not_its_bytes(archive):
    files = open_files(archive)
    packed = pickle.dumps(files)
    assert len(packed) < 4000
    assert pickle.loads(packed).read("top/sub1/001.bin") == CONTENTS["top/sub1/001.bin"]


@pytest.mark.parametrize("keep", [0.3, 0.7, 0.97])
def test_cut_tar_is_refused_wherever_it_was_cut(tmp_path, folder, keep):
    path = tmp_path / "cut.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(folder / "top", "top")
    data = path.read_bytes().rstrip(b"\0")
    for size in (int(len(data) * keep), int(len(data) * keep) // 512 * 512):
        path.write_bytes(data[:size])
        with pytest.raises(DataError, match=r"cut\.tar: .*(cut short|damaged)"):
            TarFiles(path)


def test_cut_between_members_is_refused_too(tmp_path):
    path = tmp_path / "cut.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a", "b"):
            info = tarfile.TarInfo(name)
            info.size = 512
            tar.addfile(info, io.BytesIO(b"x" * 512))
    path.write_bytes(path.read_bytes()[:1024])
    with pytest.raises(DataError, match=r"after a: no end-of-archive"):
        TarFiles(path)


def test_cut_tgz_is_refused(tmp_path, folder):
    path = tmp_path / "cut.tgz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder / "top", "top")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"cut\.tgz: the gzip stream"):
        TarFiles(path)


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100])
def test_what_is_no_tar_is_refused(tmp_path, content):
    path = tmp_path / "odd.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"odd\.tar: not a tar"):
        TarFiles(path)


@pytest.mark.parametrize("options", [{}, {"quality": 30}, {"subsampling": 0}, {"optimize": 1}])
def test_decoding_equals_opencv(options):
    data = jpeg(size=(97, 61), **options)
    theirs = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert np.array_equal(decode_image(data, "x").permute(1, 2, 0).numpy(), theirs)


def test_grey_and_png_and_exif_equal_opencv():
    grey, png, turned = io.BytesIO(), io.BytesIO(), io.BytesIO()
    picture = Image.open(io.BytesIO(jpeg()))
    picture.convert("L").save(grey, "JPEG")
    picture.convert("RGBA").save(png, "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(turned, "JPEG", exif=exif)
    for data in (grey.getvalue(), png.getvalue(), turned.getvalue()):
        theirs = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        ours = decode_image(data, "x")
        assert ours.dtype == torch.uint8
        assert np.array_equal(ours.permute(1, 2, 0).numpy(), theirs)


@pytest.mark.parametrize("data", [b"", b"no image", jpeg()[:300], jpeg(size=(200, 200))[:-400]])
def test_damaged_image_is_named(data):
    with pytest.raises(DataError, match=r"^faces\.tar:a\.jpg: unreadable image"):
        decode_image(data, "faces.tar:a.jpg")


def test_deep_image_is_refused_rather_than_clipped():
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(buffer, "PNG")
    with pytest.raises(DataError, match="expected 8 bits a channel"):
        decode_image(buffer.getvalue(), "deep.png")


def test_golden_faces_decode_exactly(golden, shared):
    files = TarFiles(shared("data/lfw.tar"))
    for name, bgr in zip(golden["names"], golden["raw_bgr"], strict=True):
        ours = decode_image(files.read(f"lfw/{name}"), str(name))
        assert np.array_equal(ours.permute(1, 2, 0).numpy(), bgr[..., ::-1]), name


def test_faults_are_counted_and_spelt_out():
    faults = [Fault(f"list.txt:{i}", "wrong") for i in range(25)]
    text = describe(tuple(faults))
    assert text.startswith("25 faults:\n  list.txt:0: wrong\n")
    assert text.endswith("and 15 more")
    with pytest.raises(DataError, match=r"25 faults.*(?s:.*)skip_missing=True") as caught:
        skip_or_raise(faults, skip_missing=False)
    assert caught.value.faults == tuple(faults)
    assert pickle.loads(pickle.dumps(caught.value)).faults == tuple(faults)
    with pytest.warns(UserWarning, match="left out: 25 faults"):
        assert skip_or_raise(faults, skip_missing=True) == tuple(faults)
    assert skip_or_raise([], skip_missing=False) == ()


def test_folder_reads_only_below_its_prefix(folder):
    assert all(n.startswith("top/sub2/") for n in FolderFiles(folder).names("top/sub2/"))
