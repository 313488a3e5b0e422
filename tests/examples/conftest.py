"""The examples as modules, and a few real photos."""

import importlib.util
import tarfile

import pytest
from conftest import ROOT


@pytest.fixture(scope="session")
def example():
    """`example("train_fnet")` is that script, imported anew."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def photos(shared, tmp_path):
    """`photos(16)` is a folder of so many photos of CelebA, with landmarks and identities."""

    def unpack(count, columns=None):
        with tarfile.open(shared("data/celeba_wild.tar")) as archive:
            table = archive.extractfile("celeba_wild/landmarks.csv").read().decode().splitlines()
            rows = [row.split(",")[:columns] for row in table[: count + 1]]
            members = [archive.getmember(f"celeba_wild/{row[0]}") for row in rows[1:]]
            archive.extractall(tmp_path, members, filter="data")
        folder = tmp_path / "celeba_wild"
        (folder / "landmarks.csv").write_text("".join(",".join(row) + "\n" for row in rows))
        return folder

    return unpack
