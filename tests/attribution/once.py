"""Models captured once for all tests that only read them: a vision transformer, and one of each kind."""

from __future__ import annotations

import functools
from typing import Any

import timm
import torch
from torch import nn

import libragrad_fx as lg
from zoo.small import Small, small

F64 = torch.float64
DEPTH, HEADS = 3, 2
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_classes": 5}


def vit(fused: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=DEPTH, num_heads=HEADS, **SMALL)
    for p in model.parameters():
        nn.init.normal_(p, 0, 0.2)
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model.double().eval()


@functools.cache
def same_vit(fused: bool = True) -> nn.Module:
    """For tests that do not change it."""
    return vit(fused)


@functools.cache
def transformed(fused: bool = True) -> Any:
    return lg.transform(same_vit(fused), torch.randn(3, 3, 32, 32, dtype=F64))


@functools.cache
def traced(fused: bool = True) -> Any:
    return lg.trace(same_vit(fused), torch.randn(3, 3, 32, 32, dtype=F64))


@functools.cache
def captured(name: str) -> tuple[Small, Any]:
    """A small model with its inputs, and its transform."""
    made = small(name)
    return made, lg.transform(made.model, made.inputs)
