"""Where we stand: every architecture of timm, torchvision, Hugging Face and OpenCLIP, one by one.

``suites`` say what there is and how to build it; the lists that no library has of itself are in ``zoo/``,
beside the package and not in the wheel. ``check`` takes one model through every promise, ``runner``
gives each model a process of its own with limits, ``report`` writes the page.
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
