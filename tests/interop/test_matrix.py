"""Unmodified libraries on the original, its plain trace and its transform: every cell of the matrix."""

from __future__ import annotations

import functools

import pytest
from torch import nn

from tests.interop import matrix
from tests.interop.matrix import CNN, FORMS, VIT

TABLES = {"vit": (VIT, matrix.small_vit), "cnn": (CNN, matrix.cnn)}
USUAL = ("ok", "same", "as ours")
NO_OWN = ("ok", "same", "runs")
FORWARD = ("ok", "same", "same")
"""Of what reads no gradient, and of a model that is balanced as it is."""
REFUSED = ("ok", "refused", "refused")
BY_TYPE = ("GuidedBackprop", "Deconvolution", "DeepLift", "LRP", "GuidedGradCam")
VIT_OTHER = {
    "Captum LayerActivation": FORWARD,
    # no module of this model has a rule, the original's neither
    "Captum LRP": ("fails (TypeError)",) * 3,
    "grad-cam AblationCAM": REFUSED,
    "grad-cam ShapleyCAM": ("fails (RuntimeError)",) * 3,  # PyTorch: no second derivative of attention
    **{f"grad-cam {n}": FORWARD for n in ("EigenCAM", "KPCA_CAM", "FEM", "ScoreCAM", "RandomCAM")},
    "Quantus Completeness": FORWARD,  # yes or no, and no for all
    "Quantus MPRT, layers found": ("15",) * 3,
}


def expected(table: str, name: str) -> tuple[str, str, str]:
    if table == "cnn":
        return REFUSED if any(kind in name for kind in BY_TYPE) else FORWARD
    return VIT_OTHER.get(name, NO_OWN if VIT[name].ours is None else USUAL)


@functools.cache
def form(table: str, name: str) -> nn.Module:
    model, x = TABLES[table][1]()
    return FORMS[name](model if name == "original" else TABLES[table][1]()[0], x)


CELLS = [
    pytest.param(table, name, marks=pytest.mark.slow if table == "vit" or "compile" in name else ())
    for table, (uses, _) in TABLES.items()
    for name in uses
]


@pytest.mark.parametrize(("table", "name"), CELLS)
def test_cell(table: str, name: str) -> None:
    uses, make = TABLES[table]
    if missing := matrix.missing(uses[name]):
        pytest.skip(f"needs {missing} (see CONTRIBUTING.md)")
    names = ("original", "`lg.trace`", "`lg.transform`")
    forms, x = functools.partial(form, table), make()[1]
    assert matrix.outcomes(uses[name], names, forms, x) == expected(table, name)
    for module in (m for n in names for m in forms(n).modules()):
        hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks
        assert not any(hooks)
        assert not module.training
