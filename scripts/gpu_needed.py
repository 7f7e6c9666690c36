"""For scripts that measure a GPU: one line where there is none, instead of a traceback or an hour on the CPU."""

import torch

from wanexp.errors import UserError


def check_device(device: str, *, instead: str) -> None:
    """Raise UserError where `device` is a GPU and none is here. instead: what to write to try the script."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"no CUDA device is available; write {instead} to try the script")
