"""Parity: does a mode give the answer of mode none?

What is compared is the predicted flow of a forward (latents dilute the error, guidance amplifies it), or for training
the gradients of the first step; the worst relative L2 error, of any forward of any sample or of any gradient, is
logged. The mode leaves its answer in a file of its
run's folder, and the reference launch, one device and mode none, computes the same and compares.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

AUTO_BUDGET_S = 60.0  # verify=auto compares the whole model only where the reference costs less than this
FREE_SHARE = 0.9  # of a device's memory that the reference may take

FILE_NAME = "parity.safetensors"
FLOWS = "flows"  # the answer of denoising: [samples, forwards, C, F, H, W]


@dataclass(frozen=True)
class Parity:
    """rel_l2: worst ||answer - reference|| / ||reference||. bit_equal: all bits are the same."""

    rel_l2: float
    bit_equal: bool


def write_answer(folder: Path, answer: Mapping[str, Tensor]) -> None:
    save_file(
        {name: tensor.detach().float().cpu().contiguous() for name, tensor in answer.items()},
        folder / FILE_NAME,
    )


def compare_answers(answer: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Parity:
    """Tensor by tensor, of `FLOWS` forward by forward, in fp64. A NaN anywhere makes rel_l2 infinite."""
    if answer.keys() != reference.keys():
        raise ValueError(f"the answers hold different tensors: {sorted(answer.keys() ^ reference.keys())}")
    worst, bit_equal = 0.0, True
    for name, expected in reference.items():
        expected, found = expected.double().cpu(), answer[name].double().cpu()
        alone = tuple(range(2 if name == FLOWS else 0, expected.ndim))
        norm = torch.linalg.vector_norm(expected, dim=alone)
        error = (torch.linalg.vector_norm(found - expected, dim=alone) / norm.clamp_min(1e-30)).max()
        worst = max(worst, error.item() if torch.isfinite(error) else float("inf"))
        bit_equal = bit_equal and torch.equal(found, expected)
    return Parity(worst, bit_equal)


def read_answer(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / FILE_NAME)


def blocks_to_verify(
    verify: str,
    *,
    num_blocks: int,
    outer_bytes: int,
    block_bytes: int,
    other_bytes: int,
    device_bytes: int,
    reference_s: float,
) -> int:
    """How many of the first blocks the reference runs: all of them, or under `auto` as many as fit and cost a minute.

    outer_bytes, block_bytes: weights outside the blocks, and of one block. other_bytes: what the reference needs
    beside weights. device_bytes: memory of the device that runs it. reference_s: predicted seconds of the whole
    reference, loading included.
    """
    if verify == "always":
        return num_blocks
    fit = int((device_bytes * FREE_SHARE - other_bytes - outer_bytes) // block_bytes)
    quick = int(num_blocks * AUTO_BUDGET_S / reference_s) if reference_s > AUTO_BUDGET_S else num_blocks
    return max(1, min(num_blocks, fit, quick))
