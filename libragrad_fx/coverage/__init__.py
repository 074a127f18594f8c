"""Checks every architecture of timm, torchvision, Hugging Face and OpenCLIP, and of twenty other libraries.

``suites`` names the models and builds them; models that no library lists itself are in ``zoo/``, beside the
package and not in the wheel. ``check`` checks every promise on one model. ``runner`` gives each model a
process of its own with limits. ``report`` writes the page.
"""

from __future__ import annotations

from libragrad_fx.coverage.check import Result, check
from libragrad_fx.coverage.report import render
from libragrad_fx.coverage.runner import STOPPED, Limits, read, run
from libragrad_fx.coverage.suites import SUITES, Subject, Suite

__all__ = [
    "STOPPED",
    "SUITES",
    "Limits",
    "Result",
    "Subject",
    "Suite",
    "check",
    "read",
    "render",
    "run",
]
