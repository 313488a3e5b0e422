"""Networks as lists of steps under the keys of a released file, written from its public code.

`shapes(steps)` is the file's list of tensors, `run(steps, weights, x)` what its network computes.
"""

import torch
from torch.nn import functional as F


def conv(key, inputs, outputs, kernel=3, stride=1, padding=None, bias=False, groups=1):
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = tuple(side // 2 for side in kernel) if padding is None else padding
    how = {"stride": stride, "padding": padding, "groups": groups}
    return "conv", key, (outputs, inputs // groups, *kernel), how, bias


def norm(key, width, affine=True, eps=1e-5):
    return "norm", key, width, affine, eps


def shapes(steps, counters=True):
    """Shape of every tensor by its key; `counters` are those of batches in batch norms."""
    found = {}
    for kind, *about in steps:
        if kind in ("add", "cat"):
            for branch in about[0]:
                found |= shapes(branch, counters)
        elif kind == "norm":
            key, width, affine, _ = about
            entries = ["running_mean", "running_var"] + ["weight", "bias"] * affine
            found |= {f"{key}.{entry}": (width,) for entry in entries}
            found |= {f"{key}.num_batches_tracked": ()} if counters else {}
        elif kind in ("conv", "linear", "prelu"):
            key, shape = about[:2]
            found[f"{key}.weight"] = shape
            if kind != "prelu" and about[-1]:
                found[f"{key}.bias"] = shape[:1]
        elif kind == "se":
            key, width = about
            found[f"{key}.fc1.weight"] = (width // 16, width, 1, 1)
            found[f"{key}.fc2.weight"] = (width, width // 16, 1, 1)
    return found


def run(steps, weights, x):
    for kind, *about in steps:
        key = about[0] if about else None
        weight, bias = (weights.get(f"{key}.{entry}") for entry in ("weight", "bias"))
        if kind == "conv":
            x = F.conv2d(x, weight, bias, **about[2])
        elif kind == "linear":
            x = F.linear(x.flatten(1), weight, bias)
        elif kind == "norm":
            mean, variance = weights[f"{key}.running_mean"], weights[f"{key}.running_var"]
            x = F.batch_norm(x, mean, variance, weight, bias, eps=about[3])
        elif kind == "prelu":
            x = F.prelu(x, weight)
        elif kind == "se":
            squeezed = F.conv2d(x.mean((2, 3), keepdim=True), weights[f"{key}.fc1.weight"])
            x = x * F.conv2d(squeezed.relu(), weights[f"{key}.fc2.weight"]).sigmoid()
        elif kind == "add":
            branches, scale = about
            x = run(branches[0], weights, x) * scale + run(branches[1], weights, x)
        elif kind == "cat":
            x = torch.cat([run(branch, weights, x) for branch in about[0]], 1)
        else:
            x = about[0](x)
    return x


def random_weights(steps, counters=True):
    """Seeded tensors of a size that keeps the signal."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, shape in shapes(steps, counters).items():
        noise = torch.randn(shape, generator=generator)
        if key.endswith("num_batches_tracked"):
            weights[key] = torch.tensor(7)
        elif len(shape) > 1:
            weights[key] = noise / noise[0].numel() ** 0.5
        else:
            weights[key] = 0.1 * noise + (0.6 if key.endswith(("weight", "var")) else 0.0)
    return weights


def overhead(steps, size, counters=True):
    """Bytes for each tensor that a file of that size has beyond its numbers."""
    listed = shapes(steps, counters)
    numbers = sum(torch.Size(shape).numel() * (4 if shape else 8) for shape in listed.values())
    return (size - numbers) / len(listed)
