"""Real photos, and the detector with its published weights."""

import pytest

from idloss import weights
from idloss.data.faces import decode_image
from idloss.data.files import open_files
from idloss.detection import MTCNN


@pytest.fixture(scope="session")
def mtcnn_cache(shared, tmp_path_factory):
    """A cache that has MTCNN's three files."""
    cache = tmp_path_factory.mktemp("weights")
    for part in ("pnet", "rnet", "onet"):
        path = shared(f"weights/mtcnn/{part}.pt")
        weights.add(f"mtcnn_{part}.widerface", path, cache_dir=cache)
    return cache


@pytest.fixture(scope="session")
def mtcnn(mtcnn_cache):
    return MTCNN(cache_dir=mtcnn_cache)


@pytest.fixture(scope="session")
def photo(shared):
    """`photo("Name/Name_0001.jpg")` is one of LFW, uint8 `[3, 250, 250]`."""
    files = open_files(shared("data/lfw.tar"))
    return lambda name: decode_image(files.read(f"lfw/{name}"), name)
