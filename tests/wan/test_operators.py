"""Functions that compilers and autograd take for operators, or leave out; themselves for everybody else."""

import pytest
import torch
from torch import Tensor

from wanexp.wan.operators import not_compiled, operator

calls: list[str] = []


def launch(x: Tensor) -> Tensor:
    calls.append("as it is" if type(x) is Tensor else "fake")
    return 2 * x


doubled = operator("wanexp_tests::doubled", fake=torch.empty_like)(launch)


def test_without_gradients_it_is_called_as_it_is(monkeypatch):
    monkeypatch.setattr(torch._library.custom_ops.CustomOpDef, "__call__", None)
    with torch.inference_mode():
        assert torch.equal(doubled(torch.ones(2)), torch.full((2,), 2.0))


def test_a_compiler_keeps_it_whole():
    seen: list[str] = []

    def backend(graph, _inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.inference_mode():
        compiled = torch.compile(lambda x: doubled(x) + 1, backend=backend, fullgraph=True)
        assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 3.0))
    assert any("wanexp_tests.doubled" in name for name in seen)


def test_autograd_is_refused():
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="autograd"):
        doubled(x).sum().backward()


class Hooks:
    def __init__(self) -> None:
        self.compiling: list[bool] = []

    @not_compiled
    def add(self, x: Tensor, *, number: int) -> Tensor:
        self.compiling.append(torch.compiler.is_compiling())
        return x + number


def test_a_compiler_leaves_a_hook_out():
    hooks, graphs = Hooks(), []

    def backend(graph, _inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    def forward(x: Tensor) -> Tensor:
        return hooks.add(2 * x, number=1) / 3

    assert torch.equal(forward(torch.ones(2)), torch.ones(2))
    torch.compiler.reset()
    assert torch.equal(torch.compile(forward, backend=backend)(torch.ones(2)), torch.ones(2))
    assert hooks.compiling == [False, False]
    assert len(graphs) == 2, "one before it, one behind it"
