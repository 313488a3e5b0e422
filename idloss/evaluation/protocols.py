"""What each protocol fixes: how probes are degraded, how SR reaches the FNet, how pairs are judged.

* `paper`: the released code of the paper, number for number (johnnysclai/SR_LRFR,
  src/lfw_verification.py and src/common/util.py). Its row called "Bicubic" feeds the FNet a
  *bilinear* enlargement, because `cv2.resize(img, size, cv2.INTER_CUBIC)` passes the flag as the
  destination; here that row is the `bilinear` method and `bicubic` is true bicubic.
* `sphereface`: the same images, judged as SphereFace's own evaluation does (wy1iu/sphereface,
  test/code/evaluation.m).
* `standard`: what the field does now: SR is an 8-bit picture, rounded, whatever its size; the two
  views' embeddings are added; pairs are judged as insightface does (deepinsight/insightface,
  recognition/arcface_torch/eval/verification.py).
* `real_world`: as `paper`, of probes that were blurred, made small, noisy and compressed as photos
  are (`idloss.degradation.RealWorldDegradation`); what happens to a face depends on its file alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from idloss.evaluation.verification import PAPER_RULE, SPHEREFACE_RULE, STANDARD_RULE, ThresholdRule
from idloss.plugins import Registry
from idloss.resample import Convention, Mode, Rounding


@dataclass(frozen=True)
class Protocol:
    """Everything that a protocol fixes.

    Args:
        name: Its name.
        rule: How pairs are turned into an accuracy.
        degradation: What makes a probe of an HR crop, by its name (`idloss.degradation`).
        up_mode: How SR reaches the FNet's crop size, on 8-bit images.
        convention: The resampler's convention.
        rounding: How SR becomes 8-bit.
        keep_exact_size: SR that has the FNet's crop size already is used as it is, not rounded.
        flip: How the embeddings of a crop and of its mirror image become one.
        source: Where the protocol is from.
    """

    name: str
    rule: ThresholdRule
    degradation: str
    up_mode: Mode
    convention: Convention
    rounding: Rounding
    keep_exact_size: bool
    flip: Literal["concat", "sum"]
    source: str

    def describe(self) -> dict[str, Any]:
        """The protocol as plain values, for a result file."""
        plain = asdict(self)
        first, *_, last = grid = self.rule.grid().tolist()
        plain["rule"]["grid"] = {"first": first, "last": last, "count": len(grid)}
        return plain

    def treatment(self) -> list[tuple[str, Any]]:
        """What it does to HR and SR: protocols that only judge otherwise share embeddings."""
        others = ("name", "rule", "degradation", "source")
        return sorted((name, how) for name, how in vars(self).items() if name not in others)


_PAPER = Protocol(
    name="paper",
    rule=PAPER_RULE,
    degradation="bicubic",
    up_mode="bicubic",
    convention="cv2",
    rounding="floor",
    keep_exact_size=True,
    flip="concat",
    source="github.com/johnnysclai/SR_LRFR at 4cf3b4bc79bcf145df1b579ba2010f709e5470b4",
)
_SPHEREFACE = replace(
    _PAPER,
    name="sphereface",
    rule=SPHEREFACE_RULE,
    source="github.com/wy1iu/sphereface at f20b130a6e080bb51d2e46a9e157686df622bef3",
)
_STANDARD = replace(
    _PAPER,
    name="standard",
    rule=STANDARD_RULE,
    rounding="nearest",
    keep_exact_size=False,
    flip="sum",
    source="github.com/deepinsight/insightface at 166d74309f060d23d002dc60308bbf870d0ab753",
)
_REAL_WORLD = replace(
    _PAPER, name="real_world", degradation="real_world", source="the paper's, and arXiv 2107.10833"
)

PROTOCOLS = Registry(
    "protocol",
    paper=_PAPER,
    sphereface=_SPHEREFACE,
    standard=_STANDARD,
    real_world=_REAL_WORLD,
)
"""All protocols by name; `register_protocol` adds to them."""


def register_protocol(protocol: Protocol) -> Protocol:
    """Let a protocol be found by its name, by the command too; for plug-ins.

    Args:
        protocol: The protocol.

    Returns:
        The protocol.

    Raises:
        ValueError: There is another one of that name.
    """
    PROTOCOLS.register(protocol.name, protocol)
    return protocol


def get_protocol(name: str | Protocol) -> Protocol:
    """Look a protocol up by name.

    Args:
        name: `"paper"`, `"sphereface"`, `"standard"`, `"real_world"`, one that was registered, or a
            protocol, which is given back.

    Returns:
        The protocol.

    Raises:
        ValueError: There is none of that name.
    """
    return name if isinstance(name, Protocol) else PROTOCOLS.find(name)
