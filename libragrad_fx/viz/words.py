"""What captions say."""

from __future__ import annotations

import math
from pathlib import PurePath
from typing import Any

from libragrad_fx.viz.page import number

_METHODS = {
    "random": "Random", "gradient": "Gradient", "input_x_gradient": "Input×Gradient",
    "smoothgrad": "SmoothGrad", "integrated_gradients": "Integrated gradients", "fullgrad": "FullGrad",
    "fullgrad_plus": "FullGrad+", "input_x_gradient_plus": "Input×Gradient+", "skip_plus": "Skip+",
    "hirescam": "HiResCAM", "gradcam": "Grad-CAM",
    "gradcam_plus": "Grad-CAM+", "xgradcam": "XGrad-CAM", "xgradcam_plus": "XGrad-CAM+",
    "raw_attention": "Raw attention", "rollout": "Rollout", "genatt": "GenAtt", "attcat": "AttCAT",
    "tokentm": "TokenTM", "legrad": "LeGrad",
}  # fmt: skip


def method_name(method: str) -> str:
    """As its authors write it."""
    inner = method.removeprefix("path_averaged(").removesuffix(")")
    said = _METHODS.get(inner, inner)
    return said if inner == method else f"{said}, path-averaged"


def side_name(policy: str) -> str:
    """What the backward was: of a policy's file, its name."""
    return {"": "plain", "libra": "balanced"}.get(policy, PurePath(policy).stem)


def target_name(target: Any, label: str, positions: bool = False) -> str:
    """``class 3 (tiger shark)``; of a text, ``token 'mat' at 4``.

    Args:
        label: what the target is called, "" where nothing is known; of one against another, both.
        positions: whether the target of two indices is a token at a position.
    """
    if target is None:
        return "its only output"
    this, against, that = label.partition(" against ")
    if against and isinstance(target, (tuple, list)) and len(target) == 2:
        pair = zip(target, (this, that), strict=True)
        return " against ".join(target_name(t, called, positions) for t, called in pair)
    where = list(target) if isinstance(target, (tuple, list)) else [target]
    if not all(isinstance(i, int) for i in where):
        return str(target)
    if len(where) == 2 and positions:
        return f"token {label!r} at {where[0]}" if label else f"token {where[1]} at {where[0]}"
    called = label.partition(",")[0]
    place = ", ".join(map(str, where))
    return f"class {place}" + (f" ({called})" if called else "")


def apart_words(found: Any, i: int) -> str:
    """What of a sample's sum no place of its picture has: the share of class and register tokens."""
    if found.prefix is None or not float(found.total[i]):
        return ""
    share = float(found.prefix[i].sum() / found.total[i])
    return f"{share:.0%} of the sum at class tokens" if abs(share) >= 0.005 else ""


def error_words(error: float) -> str:
    if math.isnan(error):
        return "it promises no sum"
    return f"completeness error {number(error) if error < 10 else format(error, '.3g')}"
