"""What is kept on disk and when it is not believed; what tells one network from another."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from nets import tiny_fnet
from safetensors.numpy import save
from tinybench import assert_same_scores, run, scores
from torch import nn

from idloss.evaluation import HR, Cell, cache, get_protocol
from idloss.evaluation.cache import ONCE, EmbeddingCache, digest_network, digest_weights
from idloss.evaluation.embedding import cell_keys, ready
from idloss.plugins import Registry
from idloss.srnets.edsr import EDSR

FULL = ("f", HR, (112, 96))


def put_beside(shard, content):
    """A shard under the right name for what it holds."""
    shard.with_name(f"{hashlib.sha256(content).hexdigest()}.safetensors").write_bytes(content)


def put_rows(shard, rows):
    put_beside(shard, save({"faces": np.zeros((2, 32), np.uint8), "rows": rows}))


def flip_a_bit(shard):
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1  # of an embedding
    shard.write_bytes(content)


HUGE = b'{"rows":{"dtype":"F32","shape":[1000000000,512],"data_offsets":[0,2048000000000]}}'
DAMAGES = {
    "cut short": lambda shard: os.truncate(shard, shard.stat().st_size - 100),
    "a bit": flip_a_bit,
    "claims much": lambda shard: put_beside(shard, len(HUGE).to_bytes(8, "little") + HUGE),
    "other rows": lambda shard: put_rows(shard, np.zeros((2, 3), np.float32)),
    "no rows": lambda shard: put_rows(shard, np.zeros((), np.float32)),
    "not finite": lambda shard: put_rows(shard, np.full((2, 16), np.nan, np.float32)),
    "grown": lambda shard: os.truncate(shard, 300 * 2**20),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_and_hostile_shards_are_named_and_made_anew(data, fnet, home, damage):
    whole = run(data, {"f": fnet}, {})
    damage(next(home.rglob("*.safetensors")))
    with pytest.warns(UserWarning, match=r"[0-9a-f]{64}\.safetensors is damaged"):
        again = run(data, {"f": fnet}, {})
    for found in (again, run(data, {"f": fnet}, {})):
        assert_same_scores(found, whole, atol=0)


def test_shard_that_cannot_be_read_stays(tmp_path):
    """Another user's, whom the folder is shared with."""
    (tmp_path / "key" / "closed.safetensors").mkdir(parents=True)
    with pytest.warns(UserWarning, match=r"closed\.safetensors cannot be read \(.*Is a directory"):
        assert not EmbeddingCache(tmp_path).known("key")
    assert (tmp_path / "key" / "closed.safetensors").exists()


def test_two_writers_at_once(tmp_path):
    rows = np.arange(400, dtype=np.float32).reshape(100, 4)
    names = [bytes([place]) * 32 for place in range(100)]

    def write():
        store = EmbeddingCache(tmp_path)
        for start in range(0, 100, 10):
            store.add("key", names[start : start + 10], rows[start : start + 10])

    with ThreadPoolExecutor(4) as pool:
        for writer in [pool.submit(write) for _ in range(4)]:
            writer.result()
    store = EmbeddingCache(tmp_path)
    assert store.known("key") == set(names)
    np.testing.assert_array_equal(store.load("key", names[::-1]), rows[::-1])
    assert not store.load("key", [None, names[3]])[0].any()
    with pytest.raises(OSError, match="1 embeddings vanished"):
        store.load("key", [b"\xff" * 32])


@pytest.mark.parametrize("after", [0, 2])
def test_cache_that_cannot_be_written_to_costs_no_run(data, fnet, srnets, home, monkeypatch, after):
    expected = run(data, {"f": fnet}, srnets, cache=False)
    real, written = cache.written_whole, []

    def full(target):
        written.append(target)
        if home in target.parents and len(written) > after:
            raise OSError(28, "No space left on device")
        return real(target)

    monkeypatch.setattr(cache, "written_whole", full)
    with pytest.warns(UserWarning, match="kept in .*No space left.*--cache-folder") as told:
        found = run(data, {"f": fnet}, srnets)
    assert len(told) == 1
    assert_same_scores(found, expected, atol=0)
    assert len([*home.rglob("*.safetensors")]) == after
    monkeypatch.setattr(cache, "written_whole", lambda target: full(home / "x"))
    with pytest.raises(OSError, match="No space left on device; set TMPDIR to a folder"):
        run(data, {"f": fnet}, {}, cache=False)


def test_cache_may_lie_elsewhere(data, fnet, home, tmp_path):
    run(data, {"f": fnet}, {}, cache=tmp_path / "mine")
    assert [*(tmp_path / "mine").rglob("*.safetensors")]
    assert not home.exists()
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be kept in .*file: "):
        run(data, {"f": fnet}, {}, cache=tmp_path / "file")


def test_digest_sees_what_repr_does_not():
    weak = EDSR(1, 4, res_scale=0.1)
    strong = EDSR(1, 4, res_scale=1.0)
    strong.load_state_dict(weak.state_dict())
    assert digest_weights(weak) == digest_weights(strong)
    assert digest_network(weak) != digest_network(strong)
    before = digest_network(weak)
    assert before == digest_network(weak.train())
    weak.crop = 4  # pixels of the border, in many an SRNet
    assert before != digest_network(weak)


class Wrapped(nn.Module):
    """An FNet around something that is no module."""

    num_features = 16
    crop = "sphereface"

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.pretrained_cfg = tiny_fnet().pretrained_cfg

    def forward(self, x):
        return self.inner(x)


def quantised(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 24, 16))
    return torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)


def session(seed):
    """Another runtime's."""
    weights = np.random.default_rng(seed).normal(size=(16, 3 * 28 * 24)).astype("f4")
    return lambda x: torch.from_numpy(x.flatten(1).numpy() @ weights.T)


def callable_of(seed):
    return tiny_fnet(seed).eval().forward


def descriptor(seed):
    return partial(tiny_fnet(seed).eval())  # as spandrel's


@pytest.mark.filterwarnings("ignore:.*quant:DeprecationWarning", "ignore:.*quant:UserWarning")
@pytest.mark.parametrize("kind", [quantised, session, callable_of, descriptor])
def test_weights_that_torch_does_not_see_are_told_apart(kind, data):
    one, two = Wrapped(kind(0)), Wrapped(kind(1))
    assert digest_weights(one) == digest_weights(two)  # the old key saw no more
    with torch.no_grad():
        expected = [scores(run(data, {"f": net}, {}, cache=False), *FULL) for net in (one, two)]
    found = [scores(run(data, {"f": net}, {}), *FULL) for net in (one, two)]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not np.allclose(*found)


class Untold(nn.Module):
    """An SRNet whose answer to noise says nothing."""

    def __init__(self, forward):
        super().__init__()
        self.forward = forward


def refuse_two(x):
    assert len(x) > 2
    return x


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x + 0.1 * torch.rand_like(x),  # a sampler
        refuse_two,
        lambda x: torch.where(x.std() > 0.28, torch.nan, x),  # knows faces only
        lambda x: torch.where(x.std() > 0.28, 0.0, x),
    ],
    ids=["noisy", "refusing", "not finite", "deaf"],
)
def test_what_cannot_be_told_apart_is_not_kept(forward, data, fnet, home):
    stream = torch.get_rng_state()
    assert digest_network(Untold(forward)) is None
    assert torch.equal(torch.get_rng_state(), stream)
    with pytest.warns(UserWarning, match="made with 'n' are not kept: it cannot be told"):
        run(data, {"f": fnet}, {"n": Untold(forward)}, batch_size=8)
    (key,) = home.iterdir()  # of HR
    assert not key.name.startswith(ONCE)


def keys_of(fnet, protocol="paper", crop="sphereface", size=(7, 6), **cfg):
    fnet.pretrained_cfg |= cfg
    fnet.crop = crop
    cells = [Cell("verification", "f", name, *size) for name in (HR, "n")]
    with ready({"f": fnet}, {"n": EDSR(1, 4)}, get_protocol(protocol), torch.device("cpu")) as nets:
        torch.manual_seed(0)
        nets.srnets["n"] = EDSR(1, 4)
        return list(cell_keys(nets, cells).values())


def test_key_holds_whatever_changes_an_embedding():
    plain = keys_of(tiny_fnet())
    assert keys_of(tiny_fnet(), "sphereface") == plain  # judged otherwise, that is all
    own = replace(get_protocol("sphereface"), name="mine", up_mode="bilinear")
    for other in (
        keys_of(tiny_fnet(), "standard"),
        keys_of(tiny_fnet(), own),
        keys_of(tiny_fnet(), crop="arcface"),
        keys_of(tiny_fnet(), mean=(0.1, 0.5, 0.6)),
        keys_of(tiny_fnet(), std=(0.1, 0.5, 0.6)),
    ):
        assert not set(plain) & set(other)
    for options in ({"size": (14, 12)}, {"protocol": "real_world"}):
        hr, lr = keys_of(tiny_fnet(), **options)
        assert hr == plain[0]
        assert lr != plain[1]


def test_key_knows_a_degradation_that_changed_under_its_name(monkeypatch):
    keys = []
    for scale in (1.0, 0.9, 1.0):

        def small(hr, size, *, seeds, scale=scale):
            return hr[..., ::16, ::16] / 255 * scale

        named = Registry("degradation", mine=lambda small=small: small)
        monkeypatch.setattr("idloss.degradation._degradations", named)
        keys.append(keys_of(tiny_fnet(), replace(get_protocol("paper"), degradation="mine")))
    assert keys[0] == keys[2] != keys[1]
