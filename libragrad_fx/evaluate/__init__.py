"""Evaluation: models by methods by policies by metrics by data, from one file.

Comes in: a ``Config`` (``config``), which a YAML file says.
Goes out: a folder of results in Parquet (``store``), with what each number was made by.
Begin with ``runner``; ``measures`` says what is measured of one batch.
"""

from __future__ import annotations

from libragrad_fx.evaluate.config import Config
from libragrad_fx.evaluate.runner import Share, evaluate

__all__ = ["Config", "Share", "evaluate"]
