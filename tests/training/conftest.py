"""A run that nothing happened to, which others are compared with."""

import pytest
import torch
from tinytraining import tiny_run


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """As processes that tests launch: how sums are split shows in their last digit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def plain(one_thread, tmp_path_factory):
    """Folder of an unbroken run on one process; not to be written to."""
    folder = tmp_path_factory.mktemp("plain")
    tiny_run(folder)
    return folder
