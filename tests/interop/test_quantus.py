"""``lg.quantus_explain``: shapes and sums by itself, and as the ``explain_func`` of Quantus's metrics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import libragrad_fx as lg
from libragrad_fx.errors import InputError
from tests.interop.matrix import randomised, small_vit

TARGETS = np.array([2, 1])


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, Any, torch.Tensor]:
    model, x = small_vit()
    return model, lg.transform(model, x), x


def test_images(case: Any) -> None:
    model, gm, x = case
    found = lg.quantus_explain(gm, x.numpy(), TARGETS, device="cpu")
    own = lg.attribute(gm, x, [2, 1])
    assert found.shape == (2, 1, 32, 32)
    np.testing.assert_allclose(found.sum((1, 2, 3)), own.values.sum((1, 2)).numpy())
    np.testing.assert_allclose(found[:, 0, ::8, ::8] * 64, own.values.numpy())
    assert np.array_equal(lg.quantus_explain(gm, x, torch.from_numpy(TARGETS)), found)
    assert np.array_equal(lg.quantus_explain(model, x, [2, 1]), found)
    fine: Any = {"method": "input_x_gradient", "resolution": "pixels"}
    pixels = lg.quantus_explain(gm, x.double().numpy(), TARGETS, **fine)
    own = lg.attribute(gm, x, [2, 1], **fine)
    assert np.array_equal(pixels[:, 0], own.values.numpy())
    last = lg.quantus_explain(gm, x, TARGETS, method="hirescam", layers=["blocks.0"])
    assert not np.array_equal(last, lg.quantus_explain(gm, x, TARGETS, method="hirescam"))


def test_policies(case: Any) -> None:
    model, gm, x = case
    relp = lg.quantus_explain(model, x, TARGETS, method="gradient", policy="relp")
    assert not np.array_equal(relp, lg.quantus_explain(gm, x, TARGETS, method="gradient"))
    again = lg.quantus_explain(lg.transform(model, x, policy="relp"), x, TARGETS, method="gradient")
    assert np.array_equal(relp, again)
    with pytest.raises(InputError, match="captured by libra"):
        lg.quantus_explain(gm, x, TARGETS, policy="relp")


def test_sequences() -> None:
    model = randomised(nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3), nn.Flatten()))
    x = torch.randn(2, 5, 4)
    found = lg.quantus_explain(lg.transform(model, x), x.numpy(), TARGETS, method="input_x_gradient")
    assert found.shape == (2, 5, 1)
    ids = torch.randint(9, (2, 5))
    text = randomised(nn.Sequential(nn.Embedding(9, 4), model))
    found = lg.quantus_explain(lg.transform(text, ids), ids.numpy(), TARGETS, method="input_x_gradient")
    assert found.shape == (2, 5)


METRICS: dict[str, dict[str, Any]] = {
    "PixelFlipping": {"features_in_step": 128},
    "FaithfulnessCorrelation": {"nr_runs": 4, "subset_size": 64},
    "MaxSensitivity": {"nr_samples": 2},
    "Sparseness": {},
    "MPRT": {},
    "EfficientMPRT": {},
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics(name: str, case: Any) -> None:
    quantus = pytest.importorskip("quantus", reason="needs quantus (see CONTRIBUTING.md)")
    _, gm, x = case
    before = [p.detach().clone() for p in gm.parameters()]
    metric = getattr(quantus, name)(disable_warnings=True, **METRICS[name])
    scores = metric(
        model=gm, x_batch=x.numpy(), y_batch=TARGETS, a_batch=None, device="cpu",
        explain_func=lg.quantus_explain, explain_func_kwargs={"method": "fullgrad_plus"},
    )  # fmt: skip
    if name == "MPRT":  # a score for each layer from the top, and they fall as the layers are randomised
        assert len(scores) == 1 + 15
        assert np.mean(scores["patch_embed.proj"]) < np.mean(scores["original"]) == 1
    else:
        assert np.isfinite(np.asarray(scores, dtype=float)).all()
    assert all(torch.equal(a, b) for a, b in zip(before, gm.parameters(), strict=True))
