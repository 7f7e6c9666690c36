"""What the server that the workers are forked from has loaded, so that no worker pays for it in its load time."""
# ruff: noqa: E402

import gc

gc.disable()  # modules are no garbage: looking for some would take a fifth of the time

import torch

import wanexp.worker  # noqa: F401
from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.transformer import WanTransformer

with torch.device("meta"):  # torch loads what it needs for this with the first module
    WanTransformer(WanArchitecture(num_layers=1))

gc.freeze()  # nor do workers look through them
gc.enable()
