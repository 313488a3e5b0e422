"""Margin losses against their papers' formulas, written out in numpy."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from idloss.training.margins import MARGINS, AdaFaceLoss, check_margin, get_margin

K, D, B = 7, 16, 12


def drawn(seed=0, length=3.0):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(B, D, generator=generator) * length
    return embeddings, torch.randint(K, (B,), generator=generator)


def made(name, **options):
    torch.manual_seed(0)
    return get_margin(name, K, D, **options)


def expected(margin, embeddings, labels, target, scale):
    """Softmax of scaled cosines, those of the right identities changed by a function of both."""
    centres = margin.loss.W.detach().double().numpy()
    x = embeddings.double().numpy()
    cosines = (x / np.linalg.norm(x, axis=1, keepdims=True)) @ (
        centres / np.linalg.norm(centres, axis=0, keepdims=True)
    )
    own = np.arange(len(labels)), labels.numpy()
    cosines[own] = target(cosines[own])
    logits = np.asarray(scale) * cosines
    return (np.log(np.exp(logits - logits.max()).sum(1)) - logits[own] + logits.max()).mean()


def steps(cosine, m):
    """Psi of A-Softmax from its definition: (-1)^k cos(m theta) - 2 k on the k-th m-th of pi."""
    theta = np.arccos(cosine)
    k = np.floor(theta * m / math.pi)
    return (-1) ** k * np.cos(m * theta) - 2 * k


@pytest.mark.parametrize(
    ("name", "target", "scale"),
    [
        ("softmax", lambda c: c, 20),
        ("cosface", lambda c: c - 0.35, 64),
        ("arcface", lambda c: np.cos(np.arccos(c) + 0.5), 64),  # no angle is beyond pi - 0.5
    ],
    ids=["softmax", "cosface", "arcface"],
)
def test_papers_formula_with_papers_constants(name, target, scale):
    embeddings, labels = drawn()
    margin = made(name)
    found = margin(embeddings, labels)
    assert found.shape == ()
    wanted = expected(margin, embeddings, labels, target, scale)
    assert found.item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("step", "easy", "options"),
    [
        (None, 5, {}),
        (10**6, 5, {}),
        (1, 1000 / 1.12, {}),
        (500, 1000 / 61, {}),
        (None, 0, {"least": 0}),  # the paper's, without annealing
    ],
)
@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_a_softmax_and_its_annealing(m, step, easy, options):
    embeddings, labels = drawn()
    margin = made("sphereface", margin=m, **options)
    lengths = embeddings.double().norm(dim=1, keepdim=True).numpy()
    found = margin(embeddings, labels, None if step is None else torch.tensor(step))

    def target(cosine):
        return (easy * cosine + steps(cosine, m)) / (1 + easy)

    wanted = expected(margin, embeddings, labels, target, lengths)
    assert found.item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("quality", "target"),
    [
        (-1, lambda c: np.cos(np.arccos(c) + 0.4)),  # ArcFace
        (0, lambda c: c - 0.4),  # CosFace
        (1, lambda c: np.cos(np.arccos(c) - 0.4) - 0.8),  # eased by the angle, hard by the cosine
    ],
)
def test_adaface_is_arcface_for_poor_faces_and_cosface_for_average_ones(quality, target):
    embeddings, labels = drawn()
    lengths = {-1: 1.0, 0: 20.0, 1: 90.0}
    embeddings = F.normalize(embeddings) * lengths[quality]
    margin = made("adaface").eval()  # what it knows of other faces stands still
    margin.loss.running_std.fill_(1e-2)
    assert margin.loss.quality(embeddings) == pytest.approx(quality, abs=1e-4)
    wanted = expected(margin, embeddings, labels, target, 64)
    assert margin(embeddings, labels).item() == pytest.approx(wanted, rel=1e-4)


def test_adaface_takes_note_of_lengths_as_the_authors_code_does():
    embeddings, labels = drawn()
    margin = made("adaface")
    margin(embeddings, labels)
    lengths = embeddings.norm(dim=1)
    assert margin.loss.running_mean.item() == pytest.approx(0.99 * 20 + 0.01 * lengths.mean())
    assert margin.loss.running_std.item() == pytest.approx(0.99 * 100 + 0.01 * lengths.std())
    before = margin.state_dict()["loss.running_std"].clone()
    margin(embeddings[:1], labels[:1])
    assert margin.loss.running_std.equal(before)
    # a third of the deviation of one standard deviation
    average = AdaFaceLoss(K, D, margin=0.4, scale=64, concentration=0.333, momentum=0).eval()
    average.running_mean.fill_(10.0)
    average.running_std.fill_(3.0)
    above = F.normalize(torch.randn(1, D)) * 13
    assert average.quality(above).item() == pytest.approx(0.333, abs=1e-3)


@pytest.mark.parametrize("name", MARGINS)
def test_gradient_is_finite_wherever_a_face_lies(name):
    """On its centre, opposite to it, and at the origin, where norms and arc cosines have edges."""
    margin = made(name)
    centres = margin.loss.W.detach().T
    embeddings = torch.cat((centres, -centres, torch.zeros(1, D), centres * 1e3, centres * 1e-3))
    embeddings.requires_grad_()
    labels = torch.cat([torch.arange(K), torch.arange(K), torch.zeros(1), *[torch.arange(K)] * 2])
    loss = margin(embeddings, labels.long(), torch.tensor(2000))
    loss.backward()
    assert loss.isfinite()
    assert embeddings.grad.isfinite().all()
    assert margin.loss.W.grad.isfinite().all()


@pytest.mark.parametrize("name", MARGINS)
def test_state_travels_and_autocast_computes_in_float32(name):
    embeddings, labels = drawn()
    first, second = made(name), get_margin(name, K, D)
    assert [p.shape for p in first.parameters()] == [(D, K)]
    assert not first.loss.W.equal(second.loss.W)
    second.load_state_dict(first.state_dict())
    plain = first(embeddings.bfloat16().float(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        half = second(embeddings.bfloat16(), labels)
    assert half.dtype == second.loss.W.dtype == torch.float32
    assert half.equal(plain)


@pytest.mark.parametrize("name", MARGINS)
def test_it_teaches(name):
    """Embeddings that are free to move find their centres, and their kind."""
    embeddings, labels = drawn()
    same = labels[:, None] == labels

    def gap():
        cosines = F.normalize(embeddings.detach()) @ F.normalize(embeddings.detach()).T
        return cosines[same].mean() - cosines[~same].mean()

    before = gap()
    embeddings.requires_grad_()
    margin = made(name)
    optimizer = torch.optim.Adam([embeddings, *margin.parameters()], lr=0.05)
    assert (margin.nearest(embeddings) == labels).float().mean() < 0.7
    for step in range(1, 101):
        optimizer.zero_grad()
        margin(embeddings, labels, torch.tensor(step)).backward()
        optimizer.step()
    assert margin.nearest(embeddings).equal(labels)
    assert gap() > before + 0.05


def test_nearest_is_by_angle():
    margin = made("cosface")
    with torch.no_grad():
        margin.loss.W[:, 0] *= 100  # a long centre is no nearer
    embeddings = margin.loss.W.detach().T * torch.arange(1, K + 1)[:, None]
    assert margin.nearest(embeddings).equal(torch.arange(K))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("arcfase", {}, r"unknown margin 'arcfase'. Did you mean 'arcface'"),
        ("arcface", {"scales": 64}, r"option of margin 'arcface' 'scales'. Did you mean 'scale'"),
        ("softmax", {"margin": 0.5}, r"option of margin 'softmax' 'margin'.*Known: scale"),
        ("arcface", {"margin": 28.6}, r"in radians, below pi / 2, got 28.6"),
        ("sphereface", {"margin": 1.5}, r"whole factor of the angle, got 1.5"),
        ("sphereface", {"least": -1}, r"least must not be negative, got -1"),
        ("cosface", {"scale": 0}, r"scale must be above zero, got 0"),
        ("cosface", {"margin": float("nan")}, r"margin must be above zero, got nan"),
        ("adaface", {"momentum": 1.0}, r"momentum must be at least 0 and below 1, got 1.0"),
    ],
)
def test_what_does_not_fit_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_margin(name, K, D, **options)


def test_sizes_are_no_options_and_one_identity_cannot_be_told_apart():
    with pytest.raises(ValueError, match="unknown option of margin 'arcface' 'num_features'"):
        check_margin("arcface", {"num_features": 3})
    with pytest.raises(ValueError, match="takes at least 2, got 1"):
        get_margin("cosface", 1, D)
