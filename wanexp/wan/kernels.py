"""Kernels that a config asks for by name, checked against the devices of a run before anything is launched."""

from collections.abc import Sequence

import torch

from wanexp.config import RunConfig
from wanexp.hardware.devices import Device
from wanexp.wan.attention import check_attention
from wanexp.wan.fused import choose_kernels


def check_kernels(config: RunConfig, devices: Sequence[Device]) -> None:
    """Raise KernelError for kernels that are known not to run on these devices. The others show when they are tried."""
    capability = min(
        (device.compute_capability for device in devices if device.compute_capability), default=None
    )
    training = config.workload.name == "train"
    check_attention(
        config.attention,
        device_type=devices[0].type,
        dtype=getattr(torch, config.precision.dtype),
        head_dim=config.model.architecture.head_dim,
        compute_capability=capability,
        training=training,
    )
    choose_kernels(
        config.kernels, device_type=devices[0].type, compute_capability=capability, training=training
    )
