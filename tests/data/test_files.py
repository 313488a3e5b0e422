"""Files out of folders and archives, and image decoding, against cv2 and the golden faces."""

import gzip
import io
import multiprocessing
import os
import pickle
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from idloss.data.faces import decode_image, image_size
from idloss.data.files import (
    DataError,
    Fault,
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


def encoded(picture, kind="PNG", **options):
    """The file of an array `[H, W]` or `[H, W, 3]` or of a Pillow image."""
    buffer = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(size=(100, 110), seed=0, **options):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return encoded(noise, "JPEG", **options)


def packed(path, *members):
    """A tar of (name, content or type and link) in this order."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                tar.addfile(info)
    return open_files(path)


def exif(orientation, *more):
    """A TIFF header with an orientation, and further entries as they are."""
    entries = [struct.pack("<HHIHxx", 0x0112, 3, 1, orientation), *more]
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


def with_exif(data, content):
    """A JPEG with an EXIF segment of any bytes."""
    segment = b"Exif\0\0" + content
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]


def test_folder_tar_and_memory_hold_the_same_files(folder, archive):
    memory = MemoryFiles("here", CONTENTS)
    for files in (open_files(folder), open_files(archive), memory):
        assert set(files.names()) == set(CONTENTS)
        assert {name: files.read(name) for name in CONTENTS} == CONTENTS
        assert sorted(files.names("top/sub1/")) == sorted(n for n in CONTENTS if "sub1" in n)
        assert "top/sub0/000.bin" in files
        assert "top/sub0" not in files
        assert 3 not in files
        with pytest.raises(DataError) as caught:
            files.read("top/none")
        assert str(caught.value).startswith(f"{files.where('top/none')}: ")
    with pytest.raises(FileNotFoundError, match="no folder and no archive at"):
        open_files(folder / "nothing")


LATIN = os.fsdecode("Zo\u00eb/caf\u00e9.jpg".encode("latin-1"))


@pytest.mark.parametrize("kind", ["folder", "tar", "link"])
def test_names_in_latin_1_are_read_as_text(tmp_path, kind):
    if kind == "folder":
        (tmp_path / LATIN).parent.mkdir()
        (tmp_path / LATIN).write_bytes(b"photo")
        files = open_files(tmp_path)
    else:
        link = [(LATIN.replace("caf", "link"), (tarfile.SYMTYPE, LATIN.partition("/")[2]))]
        files = packed(tmp_path / "a.tar", (LATIN, b"photo"), *link * (kind == "link"))
    name = "Zo\u00eb/caf\u00e9.jpg"
    assert name in set(files.names())
    assert next(iter(files.names("Zo\u00eb/"))) == name
    for spelt in (name, "Zoe\u0308/cafe\u0301.jpg"):
        assert spelt in files
        assert files.read(spelt) == b"photo"
    if kind == "link":
        assert files.read(name.replace("caf", "link")) == b"photo"
    assert all(one.encode() for one in files.names())


def test_two_files_whose_names_read_alike_are_told(tmp_path):
    for name in ("caf\u00e9.jpg", os.fsdecode("caf\u00e9.jpg".encode("latin-1"))):
        (tmp_path / name).write_bytes(name.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match="is the name of two files"):
        list(open_files(tmp_path).names())


def test_tar_is_shared_by_threads(archive):
    files = open_files(archive)
    names = [*CONTENTS] * 160
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(files.read, names))
    assert read == [CONTENTS[name] for name in names]


def test_tar_goes_to_forked_workers(archive):
    files = open_files(archive)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    worker = context.Process(target=lambda: queue.put([files.read(name) for name in CONTENTS]))
    worker.start()
    assert queue.get() == [*CONTENTS.values()]
    worker.join()
    assert files.read("top/sub1/001.bin") == CONTENTS["top/sub1/001.bin"]


def test_tar_pickles_its_index_not_its_bytes(archive):
    files = open_files(archive)
    packed = pickle.dumps(files)
    assert len(packed) < 4000
    assert pickle.loads(packed).read("top/sub1/001.bin") == CONTENTS["top/sub1/001.bin"]


@pytest.mark.parametrize("keep", [0.3, 0.7, 0.97])
def test_cut_archives_are_refused_wherever_they_were_cut(archive, keep):
    data = archive.read_bytes().rstrip(b"\0")
    for size in (int(len(data) * keep), int(len(data) * keep) // 512 * 512):
        archive.write_bytes(data[:size])
        with pytest.raises(DataError, match=rf"{archive.name}: .*(cut short|damaged)"):
            TarFiles(archive)


def test_what_is_no_tar_and_cuts_between_members_are_refused(tmp_path):
    path = tmp_path / "odd.tar"
    packed(path, ("a", b"x" * 512), ("b", b"x" * 512))
    cut = path.read_bytes()[:1024]
    for content, what in (
        (b"", "not a tar"),
        (b"no tar at all" * 100, "not a tar"),
        (cut, "cut short or damaged after a: no end-of-archive"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"odd\.tar: {what}"):
            TarFiles(path)


def saved(mode, kind, **options):
    return encoded(Image.open(io.BytesIO(jpeg())).convert(mode), kind, **options)


@pytest.mark.parametrize(
    "data",
    [
        *(jpeg(size=(97, 61), **o) for o in ({}, {"quality": 30}, {"subsampling": 0})),
        jpeg(size=(97, 61), optimize=1),
        saved("L", "JPEG"),
        saved("RGBA", "PNG"),
        *(saved("RGB", "JPEG", exif=b"Exif\0\0" + exif(tag)) for tag in range(1, 9)),
    ],
)
def test_decoding_equals_opencv(data):
    theirs = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    ours = decode_image(data, "x")
    assert ours.dtype == torch.uint8
    assert np.array_equal(ours.permute(1, 2, 0).numpy(), theirs)
    assert image_size(data, "x") == tuple(ours.shape[1:])


@pytest.mark.parametrize("data", [b"", b"no image", jpeg()[:300], jpeg(size=(200, 200))[:-400]])
def test_damaged_image_is_named(data):
    with pytest.raises(DataError, match=r"^faces\.tar:a\.jpg: unreadable image"):
        decode_image(data, "faces.tar:a.jpg")


def test_deep_image_is_refused_rather_than_clipped():
    with pytest.raises(DataError, match="expected 8 bits a channel"):
        decode_image(encoded(np.full((4, 4), 40000, np.uint16)), "deep.png")


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


def test_links_in_a_tar_are_followed(tmp_path):
    hard, soft = tarfile.LNKTYPE, tarfile.SYMTYPE
    files = packed(
        tmp_path / "links.tar",
        ("first/a.jpg", b"a"),
        ("first/b.jpg", (hard, "first/a.jpg")),
        ("second/c.jpg", (soft, "../first/a.jpg")),
        ("second/d.jpg", (soft, "c.jpg")),
        ("third", (soft, "first")),
        ("first/loop", (soft, ".")),
        ("second/round", (soft, "round")),
        ("gone.jpg", (soft, "/etc/hostname")),
    )
    for name in ("first/b.jpg", "second/c.jpg", "second/d.jpg", "third/a.jpg", "third/b.jpg"):
        assert name in files
        assert files.read(name) == b"a"
    assert {"third/a.jpg", "second/d.jpg"} <= set(files.names())
    for name in ("gone.jpg", "second/round"):
        assert name in set(files.names())
        with pytest.raises(DataError, match=rf"links\.tar:{name}: it is a link to what"):
            files.read(name)
    assert pickle.loads(pickle.dumps(files)).read("second/d.jpg") == b"a"


def test_archives_that_unpack_without_end_fill_no_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("idloss.data.files.MOST_UNPACKED", 1 << 21)
    path = tmp_path / "endless.tgz"
    path.write_bytes(gzip.compress(bytes(1 << 25)))
    with pytest.raises(DataError, match=r"endless\.tgz: it unpacks to over 0\.0 GB"):
        open_files(path)


def test_odd_names_in_a_tar_are_those_they_stand_for(tmp_path):
    files = packed(tmp_path / "odd.tar", ("./a/../b.jpg", b"b"), (".//c.jpg", b"c"))
    assert list(files.names()) == ["b.jpg", "c.jpg"]


def test_sparse_members_and_zips_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"odd\.tar:holes: a sparse member(?s:.*)Unpack it"):
        packed(tmp_path / "odd.tar", ("holes", (tarfile.GNUTYPE_SPARSE, "")))
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        archive.writestr("a.jpg", jpeg())
    with pytest.raises(DataError, match=r"faces\.zip: zip archives are not read\nUnpack it"):
        open_files(tmp_path / "faces.zip")


def test_linked_folders_are_read_and_loops_end(tmp_path):
    for name in ("real/a.jpg", "faces/own.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"a")
    (tmp_path / "faces/linked").symlink_to(tmp_path / "real")
    (tmp_path / "faces/up").symlink_to(tmp_path)
    (tmp_path / "real/here").symlink_to(".")
    files = open_files(tmp_path / "faces")
    found = list(files.names())
    assert {"own.jpg", "linked/a.jpg"} <= set(found)
    assert len(found) < 10
    assert list(files.names("linked/")) == ["linked/a.jpg"]


def test_a_folder_that_cannot_be_listed_is_named(folder, monkeypatch):
    real = os.scandir

    def refuse(path):
        if str(path).endswith("sub1"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr("idloss.data.files.os.scandir", refuse)
    with pytest.raises(DataError, match=r"folder/top/sub1: cannot be listed \(Permission denied"):
        list(open_files(folder).names())


def test_accents_are_found_in_either_composition(tmp_path):
    composed, decomposed = "Zo\u00e9/a.jpg", "Zoe\u0301/a.jpg"
    for kept, asked in ((composed, decomposed), (decomposed, composed)):
        tree = tmp_path / kept[:3].encode("unicode_escape").hex()
        (tree / kept).parent.mkdir(parents=True)
        (tree / kept).write_bytes(b"a")
        for files in (open_files(tree), packed(tmp_path / "a.tar", (kept, b"a"))):
            assert asked in files
            assert files.read(asked) == b"a"


def test_names_command_no_terminal(tmp_path):
    name = "\x1b]0;owned\x07\u202e.jpg"
    files = packed(tmp_path / "a.tar", (name, b"no picture"))
    with pytest.raises(DataError) as caught:
        decode_image(files.read(name), files.where(name))
    assert "\\x1b]0;owned\\x07\\u202e.jpg" in str(caught.value)
    assert all(letter.isprintable() or letter == "\n" for letter in str(caught.value))


def test_broken_exif_leaves_the_picture_and_what_is_readable_of_its_orientation():
    # Orientation 6 beside a resolution that is text where a fraction belongs
    data = jpeg(size=(40, 20))
    upright = decode_image(data, "x")
    broken = with_exif(data, exif(6, struct.pack("<HHI4s", 0x011A, 2, 4, b"ab")))
    assert torch.equal(decode_image(broken, "x"), upright.rot90(-1, (1, 2)))
    assert image_size(broken, "x") == (40, 20)
    for content in (b"II*\0\xff\xff\xff\xff", b"no", b"Exif\0\0" * 9, exif(77)):
        assert torch.equal(decode_image(with_exif(data, content), "x"), upright)


@pytest.mark.parametrize(
    "error", [KeyError(3), struct.error("short"), RecursionError(), MemoryError()]
)
def test_whatever_fails_names_the_photo(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(DataError, match=rf"^a\.jpg: unreadable image \({type(error).__name__}"):
        decode_image(b"", "a.jpg")


def test_postscript_never_reaches_ghostscript(monkeypatch):
    called = []
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: called.append(a))
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: called.append(a))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    with pytest.raises(DataError, match=r"^a\.jpg: unreadable image \(none of JPEG, PNG"):
        decode_image(eps, "a.jpg")
    assert not called


def test_decompression_bombs_are_refused_before_they_are_unpacked():
    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 13000, 13000, 8, 2, 0, 0, 0)
    row = zlib.compress(bytes(13000 * 3 + 1))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"13000x13000 pixels, more than 50,000,000"):
        decode_image(png, "bomb.png")
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
