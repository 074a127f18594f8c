"""Imported by the server that forks the workers, because a process's first transform costs seconds."""

from __future__ import annotations

import os

import torch

from libragrad_fx.api import transform

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # models run on the CPU; CUDA does not survive a fork
torch.set_num_threads(1)  # no pool of threads may exist when the server forks
# no backward here: PyTorch refuses a backward in a fork of a process that has run one
transform(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.GELU()), torch.ones(2, 2), check=False)
