import subprocess
import sys
from importlib.metadata import version

import idloss


def test_public_names_exist():
    for name in idloss.__all__:
        assert getattr(idloss, name).__doc__, name


def test_version_comes_from_one_place():
    assert version("idloss") == idloss.__version__


def test_import_pulls_in_nothing_heavy():
    """Extras stay out of `import idloss`, whatever is installed; timm may import what it likes."""
    code = """import sys, timm
theirs = set(sys.modules)
import idloss
print(*{name.split('.')[0] for name in sys.modules.keys() - theirs})"""
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    heavy = {"cv2", "matplotlib", "rich", "accelerate", "py7zr", "scipy", "pandas", "skimage"}
    assert not heavy & set(loaded.stdout.split())
    assert "idloss" in loaded.stdout.split()
