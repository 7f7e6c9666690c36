"""What the server that the workers are forked from has loaded, so that no worker pays for it in its load time.

The first module on the meta device makes torch import sympy and more: 0.8 s.
"""

import torch

import wanexp.worker  # noqa: F401
from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.transformer import WanTransformer

with torch.device("meta"):
    WanTransformer(WanArchitecture(num_layers=1))
