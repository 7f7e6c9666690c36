"""Which layout? Every one that `layouts` lists for the GPUs given is planned, judged and ranked. Pure.

    layouts -> plan, memory, time -> fits, or rejected with a sentence -> ranked by the objective

Only modes that the runner can run are offered.
"""

import dataclasses
from collections.abc import Sequence

from wanexp.config import AUTO_MODE, DeviceProfile, HardwareConfig, ParallelismConfig, RunConfig
from wanexp.errors import LayoutError, UserError
from wanexp.hardware.devices import Device
from wanexp.parallel.layout import split_by_weight
from wanexp.planning.candidates import Candidate, Planned, in_order, objective_of
from wanexp.planning.layouts import layouts, with_degrees
from wanexp.planning.memory import GIB, DeviceMemory, predict_memory
from wanexp.planning.plan import Plan, make_plan
from wanexp.planning.time import fastest_chunks, predict_time, swapped_block_bytes

Profiles = Sequence[DeviceProfile | None]
"""What is known of each of the devices beside it."""


def plan_layouts(
    config: RunConfig,
    devices: Sequence[Device],
    profiles: Profiles,
    *,
    host_free_bytes: int | None = None,
) -> Planned:
    """Judge every layout for `config` on `devices`, and rank them. The config's own parallelism is not looked at.

    Ranked by `config.objective`; training by throughput where that is latency (`objective_of`).

    host_free_bytes: of the host's memory, for swapped blocks; None where nobody knows.
    """
    by_index = {device.index: profile for device, profile in zip(devices, profiles, strict=True)}
    candidates = []
    for parallelism, chosen in layouts(devices):
        known = [by_index[device.index] for device in chosen]

        def judged(parallelism: ParallelismConfig) -> Candidate:
            return judge(config, parallelism, chosen, known, host_free_bytes=host_free_bytes)  # noqa: B023

        candidate = judged(parallelism)
        if parallelism.mode == "hybrid" and candidate.plan is None:
            continue  # the modes by name say why; a hybrid would only repeat it
        if parallelism.block_placement == "interleaved" and not candidate.rejection:
            assert candidate.plan
            chunks = fastest_chunks(
                dataclasses.replace(config, parallelism=parallelism), candidate.plan, known
            )
            if chunks == candidate.plan.layout.blocks:
                continue  # that is the contiguous placement
            if chunks < len(candidate.plan.block_owner):
                candidate = judged(dataclasses.replace(parallelism, block_chunks=chunks))
        candidates.append(candidate)
        # Uneven shares are for what no GPU holds whole: a small GPU beside one that does adds next to nothing.
        if candidates[0].rejection and (split := fitted_split(candidate)):
            fitted = judged(dataclasses.replace(parallelism, block_split=split))
            candidates += [] if fitted.rejection else [fitted]
    objective = objective_of(config)
    return Planned(objective, in_order(candidates, objective))


def with_asked(
    planned: Planned,
    config: RunConfig,
    devices: Sequence[Device],
    profiles: Profiles,
    *,
    host_free_bytes: int | None = None,
) -> Planned:
    """`planned` with the layout that the config asks for: one of those in it, or one more.

    Mode none is in it anyway, and what a config has that asks for nothing.
    """
    if config.parallelism.mode in ("none", AUTO_MODE):
        return planned
    asked = judge(config, config.parallelism, devices, profiles, host_free_bytes=host_free_bytes)
    if asked.plan is not None:
        same = [candidate for candidate in planned.candidates if candidate.plan == asked.plan]
        if same:
            return dataclasses.replace(planned, asked=same[0])
        written = with_degrees(config.parallelism, asked.plan.layout)
        asked = dataclasses.replace(asked, parallelism=written)
    return Planned(planned.objective, in_order([*planned.candidates, asked], planned.objective), asked)


def fitted_split(even: Candidate) -> list[int] | None:
    """Blocks for each GPU of a rank in proportion to the memory that is left for them, where equal shares do not fit.

    Left: free memory less all that is there without blocks (activations, context, embeddings and head), of the rank
    that has the least.
    """
    if not even.rejection or not even.plan or even.parallelism.block_placement != "contiguous":
        return None
    count, owner = even.plan.layout.blocks, even.plan.block_owner
    if count < 2:
        return None
    own = [owner.count(index % count) for index in range(len(even.memory))]
    block_bytes = min(entry.weights // blocks for entry, blocks in zip(even.memory, own, strict=True))
    left = [
        device.free_bytes - entry.needed + blocks * block_bytes
        for device, entry, blocks in zip(even.devices, even.memory, own, strict=True)
    ]
    rooms = [min(left[position::count]) for position in range(count)]
    if min(rooms) < block_bytes:
        return None
    split = split_by_weight(len(owner), rooms)
    return split if split != own[:count] else None


def judge(
    config: RunConfig,
    parallelism: ParallelismConfig,
    devices: Sequence[Device],
    profiles: Profiles,
    *,
    host_free_bytes: int | None = None,
) -> Candidate:
    """Plan one layout; a layout that makes no sense, or does not fit, is rejected with a sentence.

    host_free_bytes: as of `plan_layouts`.
    """
    asked = dataclasses.replace(config, parallelism=parallelism)
    context = context_bytes(config.hardware, profiles)
    try:
        plan = make_plan(asked, devices)
        memory = predict_memory(asked, plan, context_bytes=context)
        if config.offload.blocks == "auto":
            plan, memory = _with_least_swap(asked, plan, memory, devices, context)
    except LayoutError as error:
        return Candidate(parallelism, tuple(devices), rejection=str(error))
    time = predict_time(asked, plan, profiles)
    host_bytes = swapped_host_bytes(asked, plan)
    rejection = shortage(devices, memory, host_bytes, host_free_bytes)
    return Candidate(parallelism, tuple(devices), rejection, plan, memory, time, host_bytes)


def _with_least_swap(
    config: RunConfig,
    plan: Plan,
    memory: tuple[DeviceMemory, ...],
    devices: Sequence[Device],
    context: int | None,
) -> tuple[Plan, tuple[DeviceMemory, ...]]:
    """The plan that swaps the fewest blocks with which it fits; with all of them where it never does.

    Raises LayoutError where it would have to swap, and this layout or workload cannot.
    """
    if not shortage(devices, memory):
        return plan, memory

    def swapping(number: int) -> tuple[Plan, tuple[DeviceMemory, ...]]:
        offload = dataclasses.replace(config.offload, blocks=str(number))
        asked = dataclasses.replace(config, offload=offload)
        plan = make_plan(asked, devices)
        return plan, predict_memory(asked, plan, context_bytes=context)

    few, many = 0, len(plan.block_owner)  # what does not fit, what does: more blocks never take more memory
    best = swapping(many)
    if shortage(devices, best[1]):
        return best
    while many - few > 1:
        middle = (few + many) // 2
        found = swapping(middle)
        if shortage(devices, found[1]):
            few = middle
        else:
            many, best = middle, found
    return best


def swapped_host_bytes(config: RunConfig, plan: Plan) -> int:
    """Host memory of the swapped blocks' homes: each rank of a node has its own."""
    each = len(plan.swapped) * config.model.num_experts * swapped_block_bytes(config, plan)
    return plan.layout.num_ranks * each


def context_bytes(hardware: HardwareConfig, profiles: Profiles) -> int | None:
    """The CUDA context's size where a profile has it: of an enforced card, that card's."""
    if hardware.enforce_memory:
        profiles = [hardware.device]
    known = [profile.context_gib for profile in profiles if profile and profile.context_gib]
    return round(max(known) * GIB) if known else None


def shortage(
    devices: Sequence[Device],
    memory: Sequence[DeviceMemory],
    host_bytes: int = 0,
    host_free_bytes: int | None = None,
) -> str:
    """What does not fit, in a sentence; empty where everything does. Logical CPU devices share the host's memory.

    host_bytes: what the run keeps in the memory of the host beside its devices.
    """
    if devices[0].type == "cpu":
        needed = sum(entry.needed for entry in memory) + host_bytes
        free = min(device.free_bytes for device in devices)
        return f"needs {_gib(needed)} GiB of host memory, {_gib(free)} free" if needed > free else ""
    if host_free_bytes is not None and host_bytes > host_free_bytes:
        return (
            f"swapped blocks need {_gib(host_bytes)} GiB of host memory, {_gib(host_free_bytes)} free; write a "
            "smaller offload.blocks"
        )
    short = [
        (device, entry)
        for device, entry in zip(devices, memory, strict=True)
        if entry.needed > device.free_bytes
    ]
    if not short:
        return ""
    alike = len({(entry.needed, device.free_bytes) for device, entry in short}) == 1
    if alike and len(short) == len(devices):
        device, entry = short[0]
        where = f"each GPU, {_gib(device.free_bytes)} free" if len(devices) > 1 else None
        where = where or f"{device.label}, {_gib(device.free_bytes)} free"
        return f"needs {_gib(entry.needed)} GiB on {where}"
    device, entry = max(short, key=lambda pair: pair[1].needed - pair[0].free_bytes)
    others = f" (and too much on {len(short) - 1} more)" if len(short) > 1 else ""
    return f"needs {_gib(entry.needed)} GiB on {device.label}, {_gib(device.free_bytes)} free{others}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f}"


def profile_devices(hardware: HardwareConfig) -> tuple[Device, ...]:
    """The GPUs of a named machine, all memory free, without looking at the one at hand.

    Raises UserError where the profile does not say how much memory or how many GPUs there are.
    """
    profile = hardware.device
    if profile is None or profile.memory_gib is None or hardware.num_devices is None:
        raise UserError(
            f"hardware={hardware.name} does not say how many GPUs there are and how much memory each has; choose a "
            "named machine such as hardware=4x_rtx3080, or set hardware.num_devices and hardware.device.memory_gib"
        )
    num_bytes = round(profile.memory_gib * GIB)
    indices = range(hardware.num_devices)
    known = profile.compute_capability
    capability = None if known is None else (int(known), round(10 * known) % 10)
    return tuple(
        Device(
            "cuda",
            index,
            profile.name or hardware.name,
            total_bytes=num_bytes,
            free_bytes=num_bytes,
            compute_capability=capability,
            peers=tuple(other for other in indices if other != index) if profile.link == "nvlink" else (),
        )
        for index in indices
    )


def cap_memory(devices: Sequence[Device], hardware: HardwareConfig) -> tuple[Device, ...]:
    """`devices` with no more memory than the profile's, where hardware.enforce_memory asks for that."""
    if not hardware.enforce_memory:
        return tuple(devices)
    assert hardware.device and hardware.device.memory_gib
    limit = round(hardware.device.memory_gib * GIB)
    return tuple(
        dataclasses.replace(
            device, total_bytes=min(device.total_bytes, limit), free_bytes=min(device.free_bytes, limit)
        )
        for device in devices
    )
