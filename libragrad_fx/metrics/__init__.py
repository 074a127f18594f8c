"""Metrics of explanations: tensors in, one number a sample out.

| metric | of what | file, source |
|---|---|---|
| ``segmentation_ap`` | maps, masks | ``places``: average precision over pixels (Mehri et al. 2025) |
| ``iou`` | maps, masks | ``places``: at a quantile, or at the best threshold |
| ``pointing_game`` | maps, masks | ``places``: is the most relevant pixel in the mask (Zhang et al. 2018) |
| ``pointing_cell`` | maps, masks | ``places``: does the most relevant cell (token) overlap the mask |
| ``relevance_mass``, ``relevance_rank`` | maps, masks | ``places``: CLEVR-XAI (Arras et al. 2022) |
| ``precision_at_k``, ``emd_score`` | maps, masks | ``places``: XAI-TRIS (Clark et al. 2024) |
| ``enlarged`` | maps | ``places``: bicubic, to the size of masks |
| ``faithfulness`` | a model without cells | MIF, LIF: accuracy, AOPC, log-odds, SRG (Mehri et al. 2025) |
| ``parts`` | maps, part masks, outputs | the seven part scores of FunnyBirds (Hesse et al. 2023) |
| ``completeness`` | totals, outputs | does a map add up, at each layer (Sundararajan et al. 2017) |
| ``randomisation`` | a model | ``sanity``: cascading parameter randomisation (Adebayo et al. 2018) |
| ``complexity_rise`` | a model | ``sanity``: efficient MPRT (Hedström et al. 2023) |
| ``max_sensitivity`` | a model | ``sanity``: under input noise (Yeh et al. 2019) |
| ``sensitivity_n`` | a forward, maps | ``sanity``: subsets of n pixels (Ancona et al. 2018) |
| ``interval``, ``paired`` | numbers of images | ``intervals``: bootstrap over images, sign-flip test |
| ``crossed`` | numbers of seeds and images | ``intervals``: for new seeds and new images |

Maps are (B, H, W) or (B, 1, H, W), masks likewise; numbers are float64, on the device of the maps. nan
says that a metric is not defined for a sample, and ``interval(..., missing="omit")`` counts those.
"""

from __future__ import annotations

from libragrad_fx.metrics import faithfulness, parts
from libragrad_fx.metrics.completeness import Completeness, completeness
from libragrad_fx.metrics.intervals import Interval, Paired, crossed, interval, paired
from libragrad_fx.metrics.places import (
    emd_score,
    enlarged,
    iou,
    pointing_cell,
    pointing_game,
    precision_at_k,
    relevance_mass,
    relevance_rank,
    segmentation_ap,
)
from libragrad_fx.metrics.sanity import (
    Randomised,
    complexity_rise,
    max_sensitivity,
    randomisation,
    sensitivity_n,
)

__all__ = [
    "Completeness",
    "Interval",
    "Paired",
    "Randomised",
    "completeness",
    "complexity_rise",
    "crossed",
    "emd_score",
    "enlarged",
    "faithfulness",
    "interval",
    "iou",
    "max_sensitivity",
    "paired",
    "parts",
    "pointing_cell",
    "pointing_game",
    "precision_at_k",
    "randomisation",
    "relevance_mass",
    "relevance_rank",
    "segmentation_ap",
    "sensitivity_n",
]
