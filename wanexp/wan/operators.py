"""What torch.compile does not look into: kernels, operators to it and to autograd, and hooks, which it leaves out."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch._compile import _disable_dynamo

Launch = TypeVar("Launch", bound=Callable[..., Any])


def operator(
    name: str, *, mutates: Sequence[str] = (), fake: Callable[..., Any] | None = None
) -> Callable[[Launch], Launch]:
    """Have torch.compile keep a function whole: to it the operator `name`; else it is called as it is.

    As it is, autograd knows nothing of it: where gradients are switched on it is the operator, too, which refuses them.
    As an operator a call costs the host some 14 us more. mutates: arguments that it writes to. fake: gives empty
    results for the same arguments.
    """

    def make(launch: Launch) -> Launch:
        compiled = torch.library.custom_op(name, launch, mutates_args=mutates)
        if fake is not None:
            compiled.register_fake(fake)

        @wraps(launch)
        def call(*arguments: Any) -> Any:
            is_seen = torch.compiler.is_compiling() or torch.is_grad_enabled()
            return (compiled if is_seen else launch)(*arguments)

        return call  # type: ignore[return-value]

    return make


def not_compiled(function: Launch) -> Launch:
    """As torch.compiler.disable, which imports the compiler to say so (a second or two); this does where one looks."""
    kept_out = _disable_dynamo(function)

    @wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        return (kept_out if torch.compiler.is_compiling() else function)(*arguments, **keywords)

    return call  # type: ignore[return-value]
