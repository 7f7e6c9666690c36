"""Block distribution: the transformer blocks of one replica spread over the devices of one process.

    embeddings + blocks 0..k   ->   blocks k+1..m   ->   ...   ->   blocks n.. + head   ->   prediction
           device 0                    device 1                        device N-1             back to device 0

Buys memory: the weights go straight to the device that owns them (`position_of`). What crosses between devices is the
hidden states at the seams, and once a device what is the same for all blocks (modulation, context, RoPE tables).

`distribute_blocks` hooks the model, so that calling it works, one device at a time (training, too). `Pipeline` runs
several forwards at once, for speed as well. The model's code stays unaware of both, and the answer is bit-equal to one
device's, because the kernels and their inputs are the same.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from wanexp.parallel.pipeline import Stage, stages_of, wavefront
from wanexp.parallel.requests import ForwardArguments
from wanexp.wan.transformer import Pending, WanTransformer


def position_of(name: str, block_owner: Sequence[int]) -> int:
    """The position of the device that holds tensor `name`: embeddings with the first block, the head with the last."""
    if name.startswith("blocks."):
        return block_owner[int(name.split(".")[1])]
    return block_owner[-1] if name.startswith("head.") else block_owner[0]


@dataclass
class Seams:
    """Counts what crossed between devices, in bytes and copies, since `reset`. Keeps the copies of constants."""

    num_bytes: int = 0
    num_copies: int = 0
    hooks_rest: bool = False
    _constants: dict[int, WeakTensorKeyDictionary] = field(default_factory=dict)

    def reset(self) -> None:
        self.num_bytes = self.num_copies = 0

    def count(self, tensor: Tensor) -> None:
        self.num_bytes += tensor.nbytes
        self.num_copies += 1

    def move(self, tensor: Tensor, device: torch.device) -> Tensor:
        """A copy of `tensor` on `device`. Logical CPU devices copy too, so that they behave as GPUs do."""
        self.count(tensor)
        return tensor.clone() if tensor.device == device else tensor.to(device, non_blocking=True)

    def move_constant(self, tensor: Tensor, position: int, device: torch.device) -> Tensor:
        """As `move`, but one copy serves all blocks of the position for as long as `tensor` lives."""
        return self.constant_at(position, tensor, lambda: self.move(tensor, device))

    def constant_at(self, position: int, tensor: Tensor, move: Callable[[], Tensor]) -> Tensor:
        """The copy of `tensor` kept for `position`, made by `move` where there is none."""
        copies = self._constants.setdefault(position, WeakTensorKeyDictionary())
        if tensor not in copies:
            copies[tensor] = move()
        return copies[tensor]

    @contextmanager
    def without_hooks(self) -> Iterator[None]:
        """Inside, the hooks of `distribute_blocks` move nothing."""
        self.hooks_rest = True
        try:
            yield
        finally:
            self.hooks_rest = False


def distribute_blocks(
    model: nn.Module, *, block_owner: Sequence[int], devices: Sequence[torch.device]
) -> Seams:
    """Hook `model` (blocks in `model.blocks`, head in `model.head`) so that it runs over `devices`.

    block_owner: position in `devices` of each block, as `parallel.layout.place_blocks` gives it. The weights must
    be, or be loaded, where `position_of` says.
    """
    seams = Seams()
    home = block_owner[0]

    def enter(position: int, crosses: bool) -> Callable[..., Any]:
        device = devices[position]

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if seams.hooks_rest:
                return args, kwargs
            hidden_states, *constants = args
            if crosses or hidden_states.device != device:  # the latter when fewer blocks run (`first_blocks`)
                hidden_states = seams.move(hidden_states, device)
            if position != home:
                constants, kwargs = tree_map_only(
                    Tensor, lambda tensor: seams.move_constant(tensor, position, device), (constants, kwargs)
                )
            return (hidden_states, *constants), kwargs

        return hook

    def leave(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return seams.move(output, devices[home]) if previous != home and not seams.hooks_rest else output

    previous = home
    for block, position in zip(model.blocks, block_owner, strict=True):  # type: ignore[arg-type]
        if position != home or position != previous:
            block.register_forward_pre_hook(enter(position, crosses=position != previous), with_kwargs=True)
        previous = position
    model.head.register_forward_pre_hook(enter(previous, crosses=False), with_kwargs=True)  # type: ignore[union-attr]
    model.head.register_forward_hook(leave)  # type: ignore[union-attr]
    return seams


Event = torch.cuda.Event | None
"""A point in the work of a stream; None on a CPU, where everything before it is done."""


class Lane:
    """A device and the stream that computes on it: the one that is current there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"

    def active(self) -> AbstractContextManager[object]:
        """Inside, this device is the current one: Triton and other kernels start there whatever their tensors say."""
        return torch.cuda.device(self.device) if self.on_gpu else nullcontext()

    def mark(self) -> Event:
        """All that was enqueued here so far."""
        return torch.cuda.current_stream(self.device).record_event() if self.on_gpu else None

    def wait(self, event: Event) -> None:
        """What is enqueued here from now on starts after `event`. The host goes on at once."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


class Wire:
    """Copies from one device to another, in order, on streams of their own."""

    def __init__(self, source: Lane, target: Lane) -> None:
        self.on_gpu = source.on_gpu
        if self.on_gpu:
            self.sending = torch.cuda.Stream(source.device)
            self.receiving = torch.cuda.Stream(target.device)

    def carry(self, tensor: Tensor, onto: Tensor, *, after: Sequence[Event]) -> Event:
        """Copy `tensor` to `onto` after the given events; returns its arrival."""
        if not self.on_gpu:
            onto.copy_(tensor)
            return None
        for event in after:
            if event is not None:
                self.sending.wait_event(event)
        # torch copies on the current stream of the source device, and has the current streams of both devices wait
        # for each other before and after. So both have to be ours: the computing streams then wait for nothing.
        with torch.cuda.stream(self.receiving), torch.cuda.stream(self.sending):
            onto.copy_(tensor, non_blocking=True)
        return self.sending.record_event()


class Flight:
    """A micro-batch on its way. Lives to the end of the run, and with it the constants that copies read from."""

    pending: Pending | None
    output: Tensor
    time_vector: Tensor
    begun: Event  # its constants are computed
    produced: Event  # its last stage so far is

    def __init__(self, request: ForwardArguments) -> None:
        self.request = request
        self.inputs: dict[int, Any] = {}  # what every block gets after the hidden states, at each position
        self.spare: dict[int, Tensor] = {}  # hidden states at positions that it will come back to
        self.arrivals: list[Event] = []  # what its next stage waits for


class Pipeline:
    """Several forwards at a time over the devices of one process, enqueued by one thread. Inference only.

    On GPUs nothing here waits on the host (`begin` does for timesteps per token): it enqueues the whole run ahead of
    the devices, so memory that a tensor leaves is given to later kernels long before the earlier ones have run. Within
    one stream that is safe, as these run in order. A copy runs on another stream; these rules keep it safe, and no
    device ever waits for work that its own does not need:

    1. A copy starts after the event of the stage that produced its source (`produced`; `begun` for constants).
    2. A stage starts after the arrival of what it reads, waited for just before it.
    3. Memory a copy writes to. On its first visit to a device a micro-batch gets new memory there, which kernels
       enqueued on that device so far may still use: the copy waits for them. When it moves on, it keeps the hidden
       states it leaves behind (`spare`) and comes back into the same memory. No wait is needed there: the copy brings
       what was computed, in other places, from what was copied out of it.
    4. Memory a copy reads from. Hidden states of a device that the micro-batch will not see again are held
       (`_leaving`) until the stream that computes there has waited for the copy; it does so a stage late, when the
       copy is long done. Constants are held to the end of the run.
    5. Outputs come home when all is enqueued, and only then does the home device wait for them. As every copy comes
       before some output, all is over where the caller's next kernel starts on it.

    So a device holds at most one hidden state more for each micro-batch that is under way.

    Args:
        model: its weights are where `position_of` says.
        block_owner: position in `devices` of each block.
        seams: as `distribute_blocks` gave it for this model, whose hooks then rest while a pipeline runs.
    """

    def __init__(
        self,
        model: WanTransformer,
        *,
        block_owner: Sequence[int],
        devices: Sequence[torch.device],
        seams: Seams,
    ) -> None:
        self.model = model
        self.block_owner = tuple(block_owner)
        self.seams = seams
        self.lanes = [Lane(device) for device in devices]
        self._wires: dict[tuple[int, int], Wire] = {}
        self._leaving: list[deque[tuple[Tensor, Event]]] = [deque() for _ in devices]

    @torch.no_grad()
    def run(self, requests: Sequence[ForwardArguments]) -> list[Tensor]:
        """The predictions of `requests`, each as `WanTransformer.forward` gives it, on the first block's device.

        Each request is a micro-batch. Tensors of a request should be on that device; they are not changed. Raises
        UserError as the model does.
        """
        stages = stages_of(self.block_owner, self.model.num_blocks_run)
        flights = [Flight(request) for request in requests]
        with self.seams.without_hooks():
            try:
                for index, number in wavefront(len(stages), len(flights)):
                    self._advance(flights[number], stages, index)
                outputs = [self._bring_home(flight) for flight in flights]
                for position in range(len(self.lanes)):
                    self._let_go(position, keep=0)
                return outputs
            except BaseException:
                # Copies may be under way from and to memory that is about to be given back.
                for lane in self.lanes:
                    lane.synchronize()
                for leaving in self._leaving:
                    leaving.clear()
                raise

    def _advance(self, flight: Flight, stages: Sequence[Stage], index: int) -> None:
        """Enqueue one stage, and the copy to the next."""
        stage, lane = stages[index], self.lanes[stages[index].position]
        is_last = index == len(stages) - 1
        self._let_go(stage.position, keep=1)
        with lane.active():
            if index == 0:
                pending = flight.pending = self.model.begin(**vars(flight.request))
                flight.inputs[stage.position], flight.time_vector = pending.inputs, pending.time_vector
                flight.begun = lane.mark()
            else:
                assert flight.pending is not None
                pending = flight.pending
            for event in flight.arrivals:
                lane.wait(event)
            flight.arrivals.clear()
            pending.inputs = flight.inputs[stage.position]
            self.model.run_blocks(pending, stage.start, stage.stop)
            if is_last:
                flight.output = self.model.finish(pending)
            flight.produced = lane.mark()
        if is_last:
            flight.pending = None  # the hidden states go back to the stream they were made on
        else:
            self._send_on(flight, pending, stages[index:])

    def _send_on(self, flight: Flight, pending: Pending, stages: Sequence[Stage]) -> None:
        """Copy the hidden states from the first of `stages` to the next, and the constants at the first visit."""
        home, source, target = self.block_owner[0], stages[0].position, stages[1].position
        if target not in flight.inputs:

            def move_constant(tensor: Tensor) -> Tensor:
                # From home, not from `source`. A later micro-batch may find a constant moved by an earlier one (RoPE
                # tables); that one's stage was enqueued on `target` before its own, and has waited for the arrival.
                return self.seams.constant_at(
                    target, tensor, lambda: self._carry(flight, tensor, home, target, after=flight.begun)
                )

            flight.inputs[target] = tree_map_only(Tensor, move_constant, flight.inputs[home])
            if target == self.block_owner[-1]:
                pending.time_vector = move_constant(flight.time_vector)
        sent = pending.hidden_states
        pending.hidden_states = self._carry(
            flight, sent, source, target, after=flight.produced, onto=flight.spare.pop(target, None)
        )
        if any(stage.position == source for stage in stages[1:]):
            flight.spare[source] = sent
        else:
            self._leaving[source].append((sent, flight.arrivals[-1]))

    def _bring_home(self, flight: Flight) -> Tensor:
        home, head = self.block_owner[0], self.block_owner[-1]
        if head == home:
            return flight.output
        output = self._carry(flight, flight.output, head, home, after=flight.produced)
        self._leaving[head].append((flight.output, flight.arrivals[-1]))
        self.lanes[home].wait(flight.arrivals[-1])
        return output

    def _carry(
        self,
        flight: Flight,
        tensor: Tensor,
        source: int,
        target: int,
        *,
        after: Event,
        onto: Tensor | None = None,
    ) -> Tensor:
        """Enqueue a copy (`onto` given memory, where that needs no wait) and note its arrival with the flight."""
        lane, events = self.lanes[target], [after]
        if onto is None:
            onto = torch.empty_like(tensor, device=lane.device)
            events.append(lane.mark())  # who had this memory before is done
        wire = self._wires.get((source, target))
        if wire is None:
            wire = self._wires[source, target] = Wire(self.lanes[source], lane)
        self.seams.count(tensor)
        flight.arrivals.append(wire.carry(tensor, onto, after=events))
        return onto

    def _let_go(self, position: int, keep: int) -> None:
        """Free what has left `position` but for the last `keep`, in whose copies it might still have to wait."""
        leaving = self._leaving[position]
        while len(leaving) > keep:
            self.lanes[position].wait(leaving[0][1])
            leaving.popleft()
