"""FaceNet's Inception-ResNet-v1 against the released file."""

import pytest
import torch
from released import conv, norm, overhead, random_weights, run, shapes

from idloss import create_fnet
from idloss.fnets.inception_resnet import inception_resnet_timesler
from idloss.weights.loading import get_weights

POOL = ("call", lambda x: torch.nn.functional.max_pool2d(x, 3, 2))
RELU = ("call", torch.relu)


def layer(key, inputs, outputs, kernel=1, stride=1, padding=0):
    step = conv(f"{key}.conv", inputs, outputs, kernel, stride, padding)
    return [step, norm(f"{key}.bn", outputs, eps=1e-3), RELU]


def residual(key, inputs, width, shape, scale, last=False):
    """`shape` is the long side of two thin windows, or 3 for FaceNet's first kind of block."""
    branches = [layer(f"{key}.branch0", inputs, width), layer(f"{key}.branch1.0", inputs, width)]
    if inputs == 256:
        branches[1] += layer(f"{key}.branch1.1", width, width, 3, 1, 1)
        branches.append(layer(f"{key}.branch2.0", inputs, width))
        branches[2] += layer(f"{key}.branch2.1", width, width, 3, 1, 1)
        branches[2] += layer(f"{key}.branch2.2", width, width, 3, 1, 1)
    else:
        half = shape // 2
        branches[1] += layer(f"{key}.branch1.1", width, width, (1, shape), 1, (0, half))
        branches[1] += layer(f"{key}.branch1.2", width, width, (shape, 1), 1, (half, 0))
    project = conv(f"{key}.conv2d", width * len(branches), inputs, 1, bias=True)
    steps = [("add", ([("cat", branches), project], []), scale)]
    return steps if last else [*steps, RELU]


def facenet(depths):
    """timesler/facenet-pytorch, models/inception_resnet_v1.py."""
    steps = layer("conv2d_1a", 3, 32, 3, 2) + layer("conv2d_2a", 32, 32, 3)
    steps += [*layer("conv2d_2b", 32, 64, 3, 1, 1), POOL, *layer("conv2d_3b", 64, 80)]
    steps += layer("conv2d_4a", 80, 192, 3) + layer("conv2d_4b", 192, 256, 3, 2)
    for index in range(depths[0]):
        steps += residual(f"repeat_1.{index}", 256, 32, 3, 0.17)
    long = layer("mixed_6a.branch1.0", 256, 192) + layer("mixed_6a.branch1.1", 192, 192, 3, 1, 1)
    long += layer("mixed_6a.branch1.2", 192, 256, 3, 2)
    steps.append(("cat", [layer("mixed_6a.branch0", 256, 384, 3, 2), long, [POOL]]))
    for index in range(depths[1]):
        steps += residual(f"repeat_2.{index}", 896, 128, 7, 0.1)
    branches = []
    for index, outputs in enumerate((384, 256, 256)):
        key = f"mixed_7a.branch{index}"
        branches.append(layer(f"{key}.0", 896, 256))
        branches[-1] += layer(f"{key}.1", 256, 256, 3, 1, 1) if index == 2 else []
        branches[-1] += layer(f"{key}.{2 if index == 2 else 1}", 256, outputs, 3, 2)
    steps.append(("cat", [*branches, [POOL]]))
    for index in range(depths[2]):
        steps += residual(f"repeat_3.{index}", 1792, 192, 3, 0.2)
    steps += residual("block8", 1792, 192, 3, 1.0, last=True)
    steps.append(("call", lambda x: x.mean((2, 3))))
    return [*steps, ("linear", "last_linear", (512, 1792), False), norm("last_bn", 512, eps=1e-3)]


def test_keys_of_the_released_file():
    """With VGGFace2's 8,631 people, whom facenet-pytorch keeps in the file."""
    steps = [*facenet((5, 10, 5)), ("linear", "logits", (8631, 512), True)]
    with torch.device("meta"):
        released = {key: torch.empty(shape) for key, shape in shapes(steps).items()}
        model = create_fnet("inception_resnet_v1")
    model.load_state_dict(inception_resnet_timesler(released), assign=True)
    assert 150 < overhead(steps, get_weights("inception_resnet_v1").size) < 400
    del released["block8.conv2d.bias"]
    with pytest.raises(ValueError, match=r"missing keys: block8\.conv2d\.bias$"):
        inception_resnet_timesler(released)


def test_computes_what_the_released_network_does():
    steps = facenet((5, 10, 5))
    released = random_weights(steps)
    model = create_fnet("inception_resnet_v1", img_size=(96, 80)).eval()
    model.load_state_dict(inception_resnet_timesler(released))
    x = torch.randn(2, 3, 96, 80, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = run(steps, released, x)
        assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-5)
        assert expected.std() > 0.1


def test_images_too_small():
    with pytest.raises(ValueError, match="75x75 or more"):
        create_fnet("inception_resnet_v1", img_size=(74, 160))
