"""MTCNN, the paper's detector: three small networks, each judging what the one before it kept.

Zhang et al., "Joint Face Detection and Alignment using Multi-task Cascaded Convolutional Networks",
IEEE SPL 2016. Numbers without another source are those of the authors' `detect_face_v1.m`, which
timesler/facenet-pytorch, whose weights these are, has too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from idloss.detection.base import Detections, as_photos, register_detector
from idloss.weights import GitHubBlob, Weights, fetch, register_weights
from idloss.weights.files import load_checkpoint
from idloss.weights.loading import CacheDir

_CELL, _STRIDE = 12, 2  # pixels that P-Net judges at once, and from one place to the next
# what networks see at once: more leaves the caches, and takes up to twice as long
_STRIP = 1 << 18  # pixels of a level, 15 MB of feature maps
_BATCH = 64  # windows
# in place, to four sides, larger, smaller
_AROUND = [(0, 0, 0, 0), (-1, -1, -1, -1), (1, 1, 1, 1), (-1, 1, -1, 1), (1, -1, 1, -1)]
_AROUND += [(-1, -1, 1, 1), (1, 1, -1, -1)]
_LOOKS = 0.06 * torch.tensor(_AROUND, device="cpu")  # shares of a side of the box


class PNet(nn.Module):
    """Proposals: whether there is a face in each 12x12 window of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 10, 3), nn.PReLU(10)
        self.pool1 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv2, self.prelu2 = nn.Conv2d(10, 16, 3), nn.PReLU(16)
        self.conv3, self.prelu3 = nn.Conv2d(16, 32, 3), nn.PReLU(32)
        self.conv4_1, self.conv4_2 = nn.Conv2d(32, 2, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images `[B, 3, H, W]` to scores `[B, h, w]` and shifts of the boxes `[B, 4, h, w]`."""
        x = self.pool1(self.prelu1(self.conv1(x)))
        x = self.prelu3(self.conv3(self.prelu2(self.conv2(x))))
        return self.conv4_1(x).softmax(1)[:, 1], self.conv4_2(x)


class RNet(nn.Module):
    """Refinement: a closer look at 24x24 windows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 28, 3), nn.PReLU(28)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2, self.prelu2 = nn.Conv2d(28, 48, 3), nn.PReLU(48)
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv3, self.prelu3 = nn.Conv2d(48, 64, 2), nn.PReLU(64)
        self.dense4, self.prelu4 = nn.Linear(576, 128), nn.PReLU(128)
        self.dense5_1, self.dense5_2 = nn.Linear(128, 2), nn.Linear(128, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Windows `[B, 3, 24, 24]` to scores `[B]` and shifts of the boxes `[B, 4]`."""
        x = self.pool1(self.prelu1(self.conv1(x)))
        x = self.prelu3(self.conv3(self.pool2(self.prelu2(self.conv2(x)))))
        x = self.prelu4(self.dense4(_flat(x)))
        return self.dense5_1(x).softmax(1)[:, 1], self.dense5_2(x)


class ONet(nn.Module):
    """Output: the last look, at 48x48 windows, which also finds the five points."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 32, 3), nn.PReLU(32)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2, self.prelu2 = nn.Conv2d(32, 64, 3), nn.PReLU(64)
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv3, self.prelu3 = nn.Conv2d(64, 64, 3), nn.PReLU(64)
        self.pool3 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv4, self.prelu4 = nn.Conv2d(64, 128, 2), nn.PReLU(128)
        self.dense5, self.prelu5 = nn.Linear(1152, 256), nn.PReLU(256)
        self.dense6_1, self.dense6_2 = nn.Linear(256, 2), nn.Linear(256, 4)
        self.dense6_3 = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Windows `[B, 3, 48, 48]` to scores `[B]`, shifts `[B, 4]` and points `[B, 10]`."""
        x = self.pool1(self.prelu1(self.conv1(x)))
        x = self.pool2(self.prelu2(self.conv2(x)))
        x = self.pool3(self.prelu3(self.conv3(x)))
        x = self.prelu5(self.dense5(_flat(self.prelu4(self.conv4(x)))))
        return self.dense6_1(x).softmax(1)[:, 1], self.dense6_2(x), self.dense6_3(x)


def _flat(x: Tensor) -> Tensor:
    """Feature maps `[B, C, H, W]` in the order in which Matlab's Caffe flattened them."""
    return x.permute(0, 3, 2, 1).flatten(1)


_PARTS: dict[str, type[nn.Module]] = {"pnet": PNet, "rnet": RNet, "onet": ONet}
_PINNED = {
    "pnet": (
        "b41187335aa7bb5e53316ed05deed497d07ce185",
        "a2a71925e0b9996a42f63e47efc1ca19043e69558b5c523b978d611dfae49c8f",
    ),
    "rnet": (
        "e7dddc4f275ee01f74dbb1fd3a1185cbba32c09d",
        "bbb937de72efc9ef83b186c49f5f558467a1d7e3453a8ece0d71a886633f6a86",
    ),
    "onet": (
        "367bdbe6e3e9aea53873b0515bfb554d7aca6182",
        "165bfbe42940416ccfb977545cf0e976d5bf321f67083ae2aaaa5c764280118d",
    ),
}
register_weights(
    {
        f"mtcnn_{part}.widerface": Weights(
            source=GitHubBlob(
                repo="timesler/facenet-pytorch",
                commit="787da06156087cd6b616fe6608213722bddc30cd",
                parts=((f"data/{part}.pt", blob),),
                sha256=sha256,
            ),
            licence="mit",
            training_data="WIDER FACE and CelebA",
            trained_by="Zhang et al. (the paper's authors)",
        )
        for part, (blob, sha256) in _PINNED.items()
    }
)


@register_detector("mtcnn")
class MTCNN(nn.Module):
    """MTCNN as published by timesler/facenet-pytorch; moves with `.to()`.

    It judges 8-bit levels: photos in [0, 1] are rounded to them. Photos of one size are judged
    together, up to `batch_pixels`; the windows that R-Net and O-Net see come from all of them. A
    photo takes 15 bytes a pixel, and 100 MB on top.

    Args:
        thresholds: Least scores of P-, R- and O-Net.
        min_face: Height in pixels of the smallest face looked for, 12 or more. Half the height
            costs four times the work.
        factor: From one level of the pyramid to the next.
        refine: Average the points over eight windows round a face, which takes them from 1.02 to
            0.88 px of the paper's on LFW (median). False gives the published ones.
        batch_pixels: Most pixels of photos that are judged together.
        pretrained: Load the weights; without them it is for tests.
        cache_dir: Where weights are kept; see `idloss.weights.fetch`.

    Raises:
        ValueError: If an option is out of its range.
        WeightsError: If the weights cannot be had.
    """

    pnet: nn.Module
    rnet: nn.Module
    onet: nn.Module

    def __init__(
        self,
        thresholds: Sequence[float] = (0.6, 0.7, 0.7),
        min_face: float = 20,
        factor: float = 0.709,
        *,
        refine: bool = True,
        batch_pixels: int = 1 << 22,
        pretrained: bool = True,
        cache_dir: CacheDir = None,
    ) -> None:
        super().__init__()
        if len(thresholds) != 3 or not all(0 < least < 1 for least in thresholds):
            raise ValueError(f"thresholds must be three numbers in 0 to 1, got {thresholds}")
        if not _CELL <= min_face < float("inf"):
            raise ValueError(
                f"min_face must be {_CELL} pixels or more, got {min_face}: P-Net sees no smaller "
                "faces; enlarge the photo first"
            )
        if not 0.1 <= factor <= 0.95:
            raise ValueError(f"factor must lie in 0.1 to 0.95, got {factor}")
        self.thresholds, self.min_face, self.factor = tuple(thresholds), min_face, factor
        self.refine, self.batch_pixels = refine, batch_pixels
        for part, network in _PARTS.items():
            net = network()
            if pretrained:
                name = f"mtcnn_{part}.widerface"
                net.load_state_dict(dict(load_checkpoint(fetch(name, cache_dir=cache_dir), name)))
            setattr(self, part, net)
        self.eval().requires_grad_(False)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"thresholds={self.thresholds}, min_face={self.min_face}, factor={self.factor}"

    @torch.no_grad()
    def forward(self, images: Tensor | Sequence[Tensor]) -> list[Detections]:
        """Find the faces of photos; see `Detector`."""
        photos = as_photos(images)
        none = _nothing(torch.empty(0, device="cpu"))
        nothing = Detections(none.boxes, none.scores, torch.zeros(0, 5, 2, device="cpu"))
        found = dict.fromkeys(range(len(photos)), nothing)
        for places in self._batches(photos):
            batch = torch.stack([photos[place] for place in places])
            found.update(zip(places, self._detect(batch), strict=True))
        return [found[place] for place in range(len(photos))]

    def _batches(self, photos: list[Tensor]) -> Iterator[list[int]]:
        """Places of photos of one size, few enough to be judged together."""
        by_size: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        for place, photo in enumerate(photos):
            by_size[tuple(photo.shape[1:])].append(place)
        for (height, width), places in by_size.items():
            if min(height, width) * _CELL / self.min_face < _CELL:  # a line of 50 megapixels, say
                continue
            most = max(1, self.batch_pixels // (height * width))
            yield from (places[at : at + most] for at in range(0, len(places), most))

    def _detect(self, photos: Tensor) -> list[Detections]:
        """Faces of photos of one size, uint8 `[B, 3, H, W]`."""
        sums = _sums(photos.to(next(self.parameters()).device))
        windows = self._propose(sums)
        windows, shifts = _judge(self.rnet, windows, sums, 24, self.thresholds[1])
        keep = batched_nms(windows.boxes, windows.scores, windows.photos, 0.7)
        windows = windows.at(keep).moved(shifts[keep], 1).square()
        windows, shifts, points = _judge(self.onet, windows, sums, 48, self.thresholds[2])
        places = _placed(points, windows)
        windows = windows.moved(shifts, 1)
        keep = _without_nested(windows)
        windows, places = windows.at(keep), places[keep]
        if self.refine:
            places = self._look_again(windows, places, sums)
        windows, places = _Windows(*(one.cpu() for one in windows)), places.cpu()
        mine = [windows.photos == place for place in range(len(photos))]
        return [Detections(windows.boxes[m], windows.scores[m], places[m]) for m in mine]

    def _look_again(self, windows: _Windows, places: Tensor, sums: Tensor) -> Tensor:
        """Points `[N, 5, 2]` averaged with those that O-Net finds in windows near the faces."""
        sides = (windows.boxes[:, 2:] - windows.boxes[:, :2]).amax(1)
        looks = _LOOKS.to(sides)
        boxes = (windows.boxes[:, None] + sides[:, None, None] * looks).flatten(0, 1)
        photos = windows.photos.repeat_interleave(len(looks))
        near = _Windows(boxes, torch.zeros_like(boxes[:, 0]), photos).square()
        near, _, points = _judge(self.onet, near, sums, 48, -1)
        again = _placed(points, near).unflatten(0, (-1, len(looks)))
        return torch.cat((places[:, None], again), 1).mean(1)

    def _propose(self, sums: Tensor) -> _Windows:
        """What P-Net takes for faces, at all levels of the pyramid."""
        count, height, width = sums.shape[0], sums.shape[1] - 1, sums.shape[2] - 1
        found, shifts, levels = [_nothing(sums)], [sums.new_zeros(0, 4).float()], []
        scale, level = _CELL / self.min_face, 0
        while min(height, width) * scale >= _CELL:
            rows, columns = (
                _bins(sums.new_zeros(1), sums.new_tensor([long]), int(long * scale + 1))[0]
                for long in (height, width)
            )
            for first, scores, moves in self._look(sums, rows, columns):
                photos, down, across = (scores >= self.thresholds[0]).nonzero().unbind(1)
                near = _STRIDE * torch.stack((across, down + first), 1) + 1
                boxes = (torch.cat((near, near + _CELL - 1), 1) / scale).floor()
                found.append(_Windows(boxes, scores[photos, down, across], photos))
                shifts.append(moves[photos, :, down, across])
                levels.append(photos + count * level)
            scale, level = scale * self.factor, level + 1
        windows, moves = _Windows(*map(torch.cat, zip(*found, strict=True))), torch.cat(shifts)
        if not len(windows.boxes):
            return windows
        keep = batched_nms(windows.boxes, windows.scores, torch.cat(levels), 0.5)
        windows, moves = windows.at(keep), moves[keep]
        keep = batched_nms(windows.boxes, windows.scores, windows.photos, 0.7)
        return windows.at(keep).moved(moves[keep], 0).square()

    def _look(
        self, sums: Tensor, rows: Tensor, columns: Tensor
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """What P-Net says of a level, strip by strip: its first row of places, scores, shifts."""
        places = -(-(rows.shape[1] - 2) // _STRIDE) - 4
        most = max(1, _STRIP // (_STRIDE * len(sums) * columns.shape[1]))
        for first in range(0, places, most):
            # as many rows as these places see, so that strips give what the whole would
            part = rows[:, _STRIDE * first : _STRIDE * (first + most) + _CELL - _STRIDE]
            bands = sums.index_select(1, part[1]) - sums.index_select(1, part[0])
            cells = bands.index_select(2, columns[1]) - bands.index_select(2, columns[0])
            yield first, *self.pnet(_means(cells, part[None], columns[None]))


class _Windows(NamedTuple):
    """Windows of photos: `[N, 4]` pixels counted from 1, scores `[N]`, places of photos `[N]`."""

    boxes: Tensor
    scores: Tensor
    photos: Tensor

    def at(self, keep: Tensor) -> _Windows:
        return _Windows(*(one[keep] for one in self))

    def moved(self, shifts: Tensor, more: int) -> _Windows:
        """Boxes moved by a share of their sides; the released code adds a pixel but for P-Net."""
        sides = self.boxes[:, 2:] - self.boxes[:, :2] + more
        return self._replace(boxes=self.boxes + shifts * sides.repeat(1, 2))

    def square(self) -> _Windows:
        """Boxes made square about their centres."""
        sides = self.boxes[:, 2:] - self.boxes[:, :2]
        longest = sides.amax(1, keepdim=True)
        near = self.boxes[:, :2] + sides * 0.5 - longest * 0.5
        return self._replace(boxes=torch.cat((near, near + longest), 1))


def _placed(points: Tensor, windows: _Windows) -> Tensor:
    """Points of O-Net `[N, 10]`, shares of its windows, in the photo: `[N, 5, 2]`."""
    # Of windows as it saw them, in whole pixels. The released code adds to its points the fractions
    # that were cut off, below a pixel; the paper's landmarks of LFW lie as these do.
    edges = windows.boxes.trunc()
    near, sides = edges[:, :2] - 1, edges[:, 2:] - edges[:, :2] + 1
    return points.view(-1, 2, 5).mT * sides[:, None] + near[:, None]


def _nothing(like: Tensor) -> _Windows:
    none = torch.zeros(0, device=like.device)
    return _Windows(none.view(0, 4), none, none.long())


# --- mean colours of many windows at once ---------------------------------------------------------
# Levels and windows are area-averaged, from sums over all pixels above and left of each: a window
# of any size costs the same, and a few operations do all windows of all photos. The sums wrap
# around at 32 bits, which their differences do not notice (of a part of 2,900x2,900 pixels).


def _sums(photos: Tensor) -> Tensor:
    """uint8 `[B, 3, H, W]` to int32 `[B, H + 1, W + 1, 3]`."""
    count, _, height, width = photos.shape
    sums = torch.zeros(count, height + 1, width + 1, 3, dtype=torch.int32, device=photos.device)
    sums[:, 1:, 1:] = photos.permute(0, 2, 3, 1)
    sums.cumsum_(2)
    for row in range(1, height + 1):  # thrice as fast as cumsum_(1), which walks down columns
        sums[:, row] += sums[:, row - 1]
    return sums


def _bins(near: Tensor, far: Tensor, count: int) -> Tensor:
    """First pixels of each of `count` parts of lines `[N]`, and those after: `[N, 2, count]`."""
    # as adaptive pooling has it: parts share a pixel that belongs to both
    steps = torch.arange(count + 1, device=near.device) * (far - near)[:, None]
    first, after = steps[:, :-1] // count, -(-steps[:, 1:] // count)
    return torch.stack((first, after), 1) + near[:, None, None]


def _means(cells: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Sums over bins `[B, h, w, 3]` to what networks take, `[B, 3, h, w]`."""
    areas = (rows[:, 1] - rows[:, 0])[:, :, None] * (columns[:, 1] - columns[:, 0])[:, None]
    colours: Tensor = (cells / areas[..., None] - 127.5) / 128
    return colours.permute(0, 3, 1, 2)


def _judge(
    net: nn.Module, windows: _Windows, sums: Tensor, size: int, threshold: float
) -> tuple[Any, ...]:
    """Windows that a network takes for faces, and the rest of what it says of them."""
    edges = windows.boxes.trunc().long()
    # at least a pixel, also of windows outside the photo
    ends = edges.new_tensor([sums.shape[2] - 1, sums.shape[1] - 1])
    near = (edges[:, :2] - 1).clamp(min=0).minimum(ends - 1)
    far = edges[:, 2:].minimum(ends).maximum(near + 1)
    (columns, rows) = (_bins(near[:, axis], far[:, axis], size) for axis in (0, 1))
    told = []
    for part in torch.arange(len(near), device=near.device).split(_BATCH):
        down, across, photo = rows[part], columns[part], windows.photos[part, None, None]
        corners = sums[photo, down.flatten(1)[:, :, None], across.flatten(1)[:, None]]
        bands = corners[:, size:] - corners[:, :size]
        told.append(net(_means(bands[:, :, size:] - bands[:, :, :size], down, across)))
    scores, *rest = map(torch.cat, zip(*told, strict=True))
    keep = scores > threshold
    return windows.at(keep)._replace(scores=scores[keep]), *(one[keep] for one in rest)


def _without_nested(windows: _Windows) -> Tensor:
    """Places of windows, the surest first, without those that lie mostly in a surer one."""
    # of equal scores, and many are 1, the last, as numpy's argsort has it in the released code
    order = windows.scores.cpu().argsort(stable=True).flip(0)
    boxes, _, photos = _Windows(*(one.cpu() for one in windows)).at(order)
    near = boxes[:, None, :2].maximum(boxes[:, :2])
    far = boxes[:, None, 2:].minimum(boxes[:, 2:])
    areas = (boxes[:, 2:] - boxes[:, :2] + 1).prod(1)
    shared = (far - near + 1).clamp(min=0).prod(2) / areas[:, None].minimum(areas)
    hidden = (shared > 0.7) & (photos[:, None] == photos)
    alive = torch.ones(len(order), dtype=torch.bool)
    for place in range(len(order)):
        if alive[place]:
            alive[place + 1 :] &= ~hidden[place, place + 1 :]
    return order[alive].to(windows.boxes.device)
