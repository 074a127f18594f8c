"""Pictures by other libraries, of our maps."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
import torch

import libragrad_fx as lg
from tests.between import fast_first
from tests.interop.matrix import small_vit


def test_show_cam_on_image() -> None:
    image = pytest.importorskip("pytorch_grad_cam.utils.image", reason="needs grad-cam (extra: dev)")
    model, x = small_vit()
    found = lg.attribute(lg.transform(model, x), x, [1, 2])
    masks = image.scale_cam_image(np.maximum(found.values.numpy(), 0), (32, 32))  # as of their own maps
    photo = x[0].movedim(0, -1).sigmoid().numpy()
    shown = image.show_cam_on_image(photo, masks[0], use_rgb=True)
    assert shown.shape == (32, 32, 3)
    assert shown.dtype == np.uint8
    reddest = np.unravel_index(masks[0].argmax(), masks[0].shape)
    assert int(shown[reddest][0]) - int(shown[reddest][2]) > 60


METHODS = ["blended_heat_map", "heat_map", "masked_image", "alpha_scaling"]


@pytest.mark.parametrize("method", fast_first(METHODS, 1))
def test_visualize_image_attr(method: str) -> None:
    shows = pytest.importorskip("captum.attr", reason="needs captum (extra: dev)")
    mpl.use("Agg")
    model, x = small_vit()
    found = lg.quantus_explain(lg.transform(model, x), x, [1, 2])  # on the input's pixels
    photo = x[0].movedim(0, -1).sigmoid().numpy()
    sign = "all" if "heat" in method else "positive"
    figure, axis = shows.visualization.visualize_image_attr(
        np.moveaxis(found[0], 0, -1), photo, method=method, sign=sign, use_pyplot=False
    )
    assert axis.get_images()
    figure.canvas.draw()
    assert torch.equal(x, small_vit()[1])
