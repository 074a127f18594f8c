"""What every test shares: one thread, one seed, kernels of a GPU in an interpreter where there is none."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator

import pytest
import torch

from libragrad_fx.errors import CutWarning

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it where it is imported
    # ``torch.manual_seed`` writes the stack down for each kind of device that is not there: a millisecond,
    # many times a test
    for _device in (torch.cuda.random, torch.xpu.random, torch.mtia):
        _device._lazy_call = lambda *args, **kwargs: None


def pytest_collection_finish() -> None:
    """What is imported stays: no collection of garbage has to look at these million objects again. And a
    traced graph has so many that the usual 700 make a collection every few milliseconds."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def no_attention_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small attention, which is left to PyTorch's kernel, goes through ours."""
    monkeypatch.setattr("libragrad_fx.kernels.blocks._SMALL", 0)


@pytest.fixture
def dynamo_afresh() -> Iterator[None]:
    """Dynamo knows of no earlier test, and a model that is cut into several graphs is no news."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CutWarning)
        yield
