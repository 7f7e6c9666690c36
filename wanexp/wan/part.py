"""A part of a tensor: what one rank holds of it. No torch, so that planning can use it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Part:
    """The elements `start` to `stop` - 1 of a tensor along `dim`, all of the other dimensions.

    The whole of a tensor is always written as `Part.whole(shape)`, so that equal parts compare equal. An empty part
    (`start` == `stop`) says that nothing of the tensor is held.
    """

    dim: int
    start: int
    stop: int

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Part":
        return cls(0, 0, shape[0])

    @property
    def is_empty(self) -> bool:
        return self.start == self.stop

    def shape_in(self, whole: Sequence[int]) -> tuple[int, ...]:
        """The shape of this part of a tensor of shape `whole`."""
        assert 0 <= self.start <= self.stop <= whole[self.dim], (self, whole)
        return (*whole[: self.dim], self.stop - self.start, *whole[self.dim + 1 :])

    def cut(self, tensor: "Tensor") -> "Tensor":
        """This part of `tensor`, as a view."""
        return tensor.narrow(self.dim, self.start, self.stop - self.start)
