"""Models through timm, with weights that were verified first."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from timm.models import PretrainedCfg, build_model_with_cfg, resolve_pretrained_cfg
from torch import Tensor, nn

from idloss.weights.cache import fetch
from idloss.weights.catalogue import get_weights, is_registered
from idloss.weights.errors import MissingKeysError, UnknownWeightsError

_Model = TypeVar("_Model", bound=nn.Module)
_StateDict = dict[str, Tensor]


def build_model(
    model_cls: Callable[..., _Model],
    variant: str,
    pretrained: bool,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    pretrained_filter_fn: Callable[..., _StateDict] | None = None,
    **kwargs: Any,
) -> _Model:
    """Build a model as timm does; its weights, if they are registered here, are verified first.

    A `file`, `state_dict`, `url` or Hub repository that the caller puts into `pretrained_cfg` or
    `pretrained_cfg_overlay` is honoured, and so are timm's `hf-hub:` and `local-dir:` names; these
    are in the model's own layout (`idloss.weights.convert` makes that of a released one).

    Args:
        model_cls: The model's class.
        variant: Its entry point's name.
        pretrained: Load weights; every tensor must be there, but for those of a classifier
            whose `num_classes` differs.
        cache_dir: As in `fetch`.
        pretrained_cfg: As in timm.
        pretrained_cfg_overlay: As in timm.
        pretrained_filter_fn: As in timm.
        kwargs: For timm's `build_model_with_cfg`, and the rest for the class.

    Returns:
        The model, in train mode, as timm returns it.

    Raises:
        UnknownWeightsError: If there are no weights to load.
        MissingKeysError: If the state dict has not exactly the model's keys.
        WeightsError: As in `fetch`.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    if pretrained:
        cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
        name = f"{variant}.{cfg.tag}" if cfg.tag else variant
        if _is_ours(cfg, name):
            overlay["file"] = str(fetch(name, cache_dir=cache_dir))
        elif not (cfg.has_weights or cfg.state_dict):
            raise UnknownWeightsError(
                f"there are no weights for {name!r}. Use pretrained=False, or a tag that has some: "
                "timm.list_models(..., pretrained=True)"
            )
        pretrained_filter_fn = _strict_filter(name, pretrained_filter_fn)
    model: _Model = build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        cache_dir=None if cache_dir is None else Path(cache_dir),
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=pretrained_filter_fn,
        **kwargs,
    )
    return model


def _is_ours(cfg: PretrainedCfg, name: str) -> bool:
    """Whether timm would load registered weights, not what the caller put in their place."""
    if cfg.source in ("hf-hub", "local-dir") or cfg.file or cfg.state_dict or cfg.hf_hub_id:
        return False
    return is_registered(name) and cfg.url == get_weights(name).cfg()["url"]


def _strict_filter(
    name: str, inner: Callable[..., _StateDict] | None
) -> Callable[[_StateDict, nn.Module], _StateDict]:
    """A timm checkpoint filter that compares the keys before timm relaxes its own comparison.

    timm loads without strictness as soon as `num_classes` differs, and then any
    tensor may be missing in silence.
    """

    def check(state_dict: _StateDict, model: nn.Module) -> _StateDict:
        if inner is not None:
            state_dict = inner(state_dict, model)
        cfg: Any = model.pretrained_cfg
        classifiers = cfg.get("classifier") or ()
        heads = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
        differing = model.state_dict().keys() ^ state_dict.keys()
        wrong = sorted(key for key in differing if key.rpartition(".")[0] not in heads)
        if wrong:
            missing = [key for key in wrong if key not in state_dict]
            unexpected = [key for key in wrong if key in state_dict]
            raise MissingKeysError(
                f"{name}: the weights do not fit the model; missing: {_some(missing)}; "
                f"unexpected: {_some(unexpected)}. A released checkpoint goes through "
                f"idloss.weights.convert({name!r}, path, target) first."
            )
        return state_dict

    return check


def _some(keys: list[str], limit: int = 8) -> str:
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return (", ".join(keys[:limit]) or "none") + more
