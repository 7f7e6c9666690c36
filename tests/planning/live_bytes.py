"""Counts the bytes of live tensors on the CPU while real code runs: the yardstick of the memory model.

Every storage that an operator returns is counted from then until it dies. What an operator allocates and frees inside
itself is not seen; `F.rms_norm`, one kernel on GPUs but several operators on the CPU, is made to look like one, and
linear layers multiply in their own dtype, as on GPUs. Products and attention, most of the time, are not computed: what
they return has the right size and any numbers.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from wanexp.wan import linear

NOT_COMPUTED = (
    "mm",
    "addmm",
    "linear",
    "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)


class LiveBytes(TorchDispatchMode):
    """Inside `with`: `live` and `peak` in bytes of what was made inside and still lives."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, int] = {}
        self._is_paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {
            id(leaf.untyped_storage())
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        is_computed = func.overloadpacket.__name__ not in NOT_COMPUTED
        result = (func if is_computed else sized(func))(*args, **(kwargs or {}))
        if not self._is_paused:
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor) and id(leaf.untyped_storage()) not in known:
                    self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = id(storage), storage.nbytes()
        if key in self._known:
            return
        self._known[key] = num_bytes
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key)

    def released(self, *tensors: torch.Tensor) -> None:
        """Their memory was given back, though they live on."""
        for tensor in tensors:
            key = id(tensor.untyped_storage())
            self.live -= self._known[key]
            self._known[key] = 0

    def _remove(self, key: int) -> None:
        self.live -= self._known.pop(key)

    def __enter__(self) -> "LiveBytes":
        self._rms_norm = F.rms_norm
        F.rms_norm = self._one_rms_norm
        self._cpu_multiplies = linear.cpu_multiplies
        linear.cpu_multiplies = lambda _dtype: True
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        F.rms_norm = self._rms_norm
        linear.cpu_multiplies = self._cpu_multiplies
        super().__exit__(*exception)

    def _one_rms_norm(self, x: torch.Tensor, shape: Any, *, eps: float) -> torch.Tensor:
        return _RmsNorm.apply(x, shape, eps, self)

    def unseen(self, function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Call `function`; only its result is counted."""
        before, self._is_paused = self._is_paused, True
        try:
            result = function(*args, **kwargs)
        finally:
            self._is_paused = before
        self._add(result.untyped_storage())
        return result


def sized(func: Callable[..., Any]) -> Callable[..., Any]:
    """`func` for the sizes of what it returns, on the CPU."""

    def of_any_numbers(*args: Any, **kwargs: Any) -> Any:
        result = func(*tree_map_only(torch.Tensor, lambda x: x.to("meta"), args), **kwargs)
        return tree_map_only(torch.Tensor, lambda x: torch.empty_like(x, device="cpu"), result)

    return of_any_numbers


class _RmsNorm(torch.autograd.Function):
    """As the CUDA kernel: keeps its input, and nothing of its insides is seen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shape: Any, eps: float, tracker: LiveBytes) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.arguments = shape, eps, tracker
        return tracker.unseen(tracker._rms_norm, x, shape, eps=eps)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        (x,), (shape, eps, tracker) = ctx.saved_tensors, ctx.arguments

        def of_input() -> torch.Tensor:
            leaf = x.detach().requires_grad_()
            with torch.enable_grad():
                return torch.autograd.grad(tracker._rms_norm(leaf, shape, eps=eps), leaf, gradient)[0]

        return tracker.unseen(of_input), None, None, None
