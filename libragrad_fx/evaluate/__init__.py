"""Evaluation: models by methods by policies by metrics by data, from one file.

Comes in: a ``Config`` (``config``), which a YAML file says.
Goes out: a folder of results in Parquet (``store``), with what each number was made by.
Begin with ``runner``; ``inputs`` makes of a sample what a model takes, and ``measures`` says what is
measured of one batch. ``data`` stands alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from libragrad_fx.evaluate.config import Config
    from libragrad_fx.evaluate.runner import Share, evaluate

__all__ = ["Config", "Share", "evaluate"]


def __getattr__(name: str) -> Any:
    """The public names. They need pydantic, which a set of ``data`` does not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from libragrad_fx.evaluate import config, runner

    return {"Config": config.Config, "Share": runner.Share, "evaluate": runner.evaluate}[name]
