"""Our transformer and those of diffusers and xDiT on one set of weights: what bench_peers.py compares.

    weights (one copy on the GPU) --.--> WanTransformer                  native names
                                    |--> diffusers' WanTransformer3DModel  its names; a few tensors in fp32
                                    '--> xDiT's wrapper around that

Each contender becomes a function from the same inputs to a predicted flow, on one GPU or all of them. diffusers
(0.42.1) and xDiT (the package xfuser, 0.7.0) are optional: `missing` says in a sentence what is not installed.
"""

import functools
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wanexp.parallel.cfg_parallel import split_guidance
from wanexp.parallel.context_parallel import context_parallel
from wanexp.parallel.peer_memory import open_peer_memory
from wanexp.parallel.requests import ForwardArguments, one_after_another
from wanexp.parallel.traffic import Traffic
from wanexp.wan.architecture import NORM_EPS, PATCH_SIZE, WanArchitecture
from wanexp.wan.fused import choose_kernels
from wanexp.wan.key_names import native_to_diffusers
from wanexp.wan.transformer import WanTransformer
from wanexp.wan.weights import RandomWeights

Weights = Mapping[str, Tensor]
"""Native name -> tensor in bf16 on the device that computes. Nobody writes to it: all models share it."""


@dataclass(frozen=True)
class Inputs:
    """Of one forward. latent [batch, channels, frames, height, width] and text [batch, text_len, text_dim] in bf16."""

    latent: Tensor
    timestep: Tensor
    text: Tensor


Forward = Callable[[Inputs], Tensor]
"""Inputs -> the predicted flow, in the shape of the latent."""


@dataclass(frozen=True)
class Contender:
    """One way to run the model. On one GPU each rank runs it alone, on several all run it by Ulysses.

    library: the package it needs. attention: in that library's words. is_guided: a call is not one forward but a
    guided step of two, one on each of two GPUs.
    """

    name: str
    title: str
    library: str
    attention: str = "auto"
    is_compiled: bool = False
    is_guided: bool = False


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("ours", "wanexp", "wanexp"),
        Contender("ours_cfg", "wanexp, a guided step by cfg_parallel", "wanexp", is_guided=True),
        Contender("xdit", "xDiT, compiled blocks, FlashAttention-3", "xfuser", "FLASH_3", True),
        Contender("diffusers", "diffusers, compiled blocks, cuDNN", "diffusers", "_native_cudnn", True),
        # Slower ones, only when asked for.
        Contender("xdit_eager", "xDiT, eager, FlashAttention-3", "xfuser", "FLASH_3"),
        Contender("xdit_cudnn", "xDiT, compiled blocks, cuDNN", "xfuser", "CUDNN", True),
        Contender("xdit_sdpa", "xDiT, eager, PyTorch's choice of attention", "xfuser", "SDPA"),
        Contender("diffusers_eager", "diffusers, eager, cuDNN", "diffusers", "_native_cudnn"),
        Contender(
            "diffusers_flash", "diffusers, compiled blocks, SDPA flash", "diffusers", "_native_flash", True
        ),
        Contender(
            "diffusers_native", "diffusers, eager, PyTorch's choice of attention", "diffusers", "native"
        ),
    )
}
DEFAULT_CONTENDERS = ("ours", "ours_cfg", "xdit", "diffusers")


def missing(contender: Contender) -> str | None:
    """What `contender` needs and is not installed here, as a sentence; None if nothing."""
    needed = {"xfuser": "xfuser==0.7.0", "diffusers": "diffusers==0.42.1"}
    for package in ("diffusers", "xfuser") if contender.library == "xfuser" else (contender.library,):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed (pip install {needed[package]})"
    if contender.attention == "FLASH_3" and not _is_there("flash_attn_interface", "fa3_fwd_interface"):
        return "FlashAttention-3 is not installed (pip install fa3-fwd)"
    return None


def random_weights(architecture: WanArchitecture, device: torch.device, seed: int = 0) -> Weights:
    """The weights that every run with random ones has, in bf16."""
    source = RandomWeights(architecture, seed)
    return {
        name: source.read(name, device=device, dtype=torch.bfloat16)
        for name, _ in architecture.tensor_shapes()
    }


def build(
    contender: Contender,
    architecture: WanArchitecture,
    weights: Weights,
    *,
    degree: int,
    attention: tuple[str, str] = ("auto", "auto"),
) -> Forward:
    """The contender, ready to be called by all ranks under `torch.no_grad`.

    degree: 1, each rank alone, or the number of all ranks. attention: our kernels for self- and cross-attention. Needs
    the default process group. Raises whatever the library raises.
    """
    if contender.library == "wanexp":
        return _ours(contender, architecture, weights, degree, attention)
    if contender.library == "diffusers":
        return _diffusers(contender, architecture, weights, degree)
    return _xdit(contender, architecture, weights, degree)


def _ours(
    contender: Contender,
    architecture: WanArchitecture,
    weights: Weights,
    degree: int,
    attention: tuple[str, str],
) -> Forward:
    device = weights["patch_embedding.weight"].device
    with torch.device("meta"):
        model = WanTransformer(architecture, dtype=torch.bfloat16)
    model.load_state_dict(weights, assign=True)
    model.eval().requires_grad_(False)
    model.set_attention(*attention)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    model.set_kernels(
        choose_kernels("auto", device_type=device.type, compute_capability=capability, training=False)
    )
    if contender.is_guided:
        assert dist.group.WORLD is not None
        forwards = split_guidance(one_after_another(model), dist.group.WORLD, Traffic())

        def guided(inputs: Inputs) -> Tensor:
            prompts = (inputs.text, -inputs.text)  # any other text will do for the negative prompt
            requests = [ForwardArguments(inputs.latent, inputs.timestep, text) for text in prompts]
            return forwards(requests)[0]

        return guided
    if degree > 1:
        assert dist.group.WORLD is not None
        memories = open_peer_memory([dist.group.WORLD], device) if device.type == "cuda" else None
        memory = memories[0] if memories else None  # as transport=auto decides
        context_parallel(model, ulysses=dist.group.WORLD, ring=None, memory=memory)
    return lambda inputs: model(inputs.latent, inputs.timestep, inputs.text)


def _diffusers(contender: Contender, architecture: WanArchitecture, weights: Weights, degree: int) -> Forward:
    from diffusers import ContextParallelConfig, WanTransformer3DModel

    model = _diffusers_model(WanTransformer3DModel, architecture, weights)
    model.set_attention_backend(contender.attention)
    if degree > 1:
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=degree))
    return _call_of(model, contender)


def _xdit(contender: Contender, architecture: WanArchitecture, weights: Weights, degree: int) -> Forward:
    offer_flash_attention_3()  # xfuser looks for it when it is imported
    os.environ.setdefault("XDIT_LOGGING_LEVEL", "WARNING")
    from xfuser import xFuserArgs
    from xfuser.core.distributed import get_runtime_state, initialize_runtime_state, runtime_state
    from xfuser.model_executor.models.transformers.transformer_wan import xFuserWanTransformer3DWrapper

    start_xdit(degree)
    model = _diffusers_model(xFuserWanTransformer3DWrapper, architecture, weights)
    config, _ = xFuserArgs(
        model="",
        data_parallel_degree=dist.get_world_size() // degree,
        ulysses_degree=degree,
        attention_backend=contender.attention,
    ).create_config()
    # Of the pipeline it looks at the transformer only.
    initialize_runtime_state(SimpleNamespace(transformer=model), config)
    state, forward = get_runtime_state(), _call_of(model, contender)

    def call(inputs: Inputs) -> Tensor:
        runtime_state._RUNTIME = state  # one for all models of a process, and it holds the attention kernel
        return forward(inputs)

    return call


def start_xdit(degree: int) -> None:
    """xDiT's process groups for `degree` ranks a forward; may be called again, with another degree too."""
    from xfuser.core.distributed import (
        init_distributed_environment,
        initialize_model_parallel,
        parallel_state,
    )

    if parallel_state.model_parallel_is_initialized():
        if parallel_state.get_sequence_parallel_world_size() == degree:
            return
        parallel_state.destroy_model_parallel()
    rank, world_size, backend = dist.get_rank(), dist.get_world_size(), _backend()
    init_distributed_environment(world_size, rank, local_rank=rank, backend=backend)
    initialize_model_parallel(
        data_parallel_degree=world_size // degree,
        sequence_parallel_degree=degree,
        ulysses_degree=degree,
        backend=backend,
    )


def stop_xdit() -> None:
    """Give xDiT's groups back, if there are any, before the process group ends."""
    if "xfuser.core.distributed" in sys.modules:
        from xfuser.core.distributed import parallel_state

        parallel_state.destroy_model_parallel()


def _call_of(model: Any, contender: Contender) -> Forward:
    if contender.is_compiled:
        model.compile_repeated_blocks()
    return lambda inputs: model(
        hidden_states=inputs.latent,
        timestep=inputs.timestep,
        encoder_hidden_states=inputs.text,
        return_dict=False,
    )[0]


def _diffusers_model(cls: Any, architecture: WanArchitecture, weights: Weights) -> Any:
    """A WanTransformer3DModel or a class derived from it, as `from_pretrained(torch_dtype=bfloat16)` makes it.

    That keeps some modules in fp32; all others lie in the memory of `weights`.
    """
    with _parameters_on_meta():
        model = cls(
            patch_size=PATCH_SIZE,
            num_attention_heads=architecture.num_heads,
            attention_head_dim=architecture.head_dim,
            in_channels=architecture.in_channels,
            out_channels=architecture.out_channels,
            text_dim=architecture.text_dim,
            freq_dim=architecture.freq_dim,
            ffn_dim=architecture.ffn_dim,
            num_layers=architecture.num_layers,
            eps=NORM_EPS,
        )
    kept = set(cls._keep_in_fp32_modules)
    state = {}
    for native, tensor in weights.items():
        name = native_to_diffusers(native)
        state[name] = tensor.float() if kept & set(name.split(".")) else tensor
    model.load_state_dict(state, assign=True)
    device = weights["patch_embedding.weight"].device
    return model.to(device).eval().requires_grad_(False)  # what moves is its tables


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside get parameters without memory, but real buffers: those are tables, computed when built."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@functools.cache
def offer_flash_attention_3() -> tempfile.TemporaryDirectory | None:
    """Where only fa3-fwd is installed, make it importable by the name that xDiT knows.

    The module is in the folder that is returned, which the cache keeps until the process ends.
    """
    if _is_there("flash_attn_interface") or not _is_there("fa3_fwd_interface"):
        return None
    folder = tempfile.TemporaryDirectory(prefix="flash_attn_interface_")
    sys.path.insert(0, folder.name)
    (Path(folder.name) / "flash_attn_interface.py").write_text(
        '"""FlashAttention-3 of fa3-fwd."""\n'
        "from fa3_fwd_interface import flash_attn_func, flash_attn_varlen_func\n"
    )
    importlib.invalidate_caches()
    return folder


def _is_there(*modules: str) -> bool:
    return any(importlib.util.find_spec(module) is not None for module in modules)


def _backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"
