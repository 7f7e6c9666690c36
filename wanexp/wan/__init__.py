"""The Wan video transformer: its facts, its code, its checkpoints.

`load_transformer` is imported on first use, so that the configuration (which needs only the facts) does not
import torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wanexp.wan.weights import load_transformer

__all__ = ["load_transformer"]


def __getattr__(name: str) -> Any:
    if name == "load_transformer":
        from wanexp.wan.weights import load_transformer

        return load_transformer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
