"""Which layout? Every legal one for the GPUs given is planned, judged and ranked. Pure.

    layouts -> plan, memory, time -> fits, or rejected with a sentence -> ranked by the objective

Only modes that the runner can run are offered.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from wanexp.config import DeviceProfile, HardwareConfig, ParallelismConfig, RunConfig
from wanexp.errors import LayoutError, UserError
from wanexp.hardware.devices import Device
from wanexp.parallel.layout import split_by_weight
from wanexp.planning.layouts import BUYS, layout_name, layout_settings, layouts
from wanexp.planning.memory import GIB, DeviceMemory, predict_memory
from wanexp.planning.plan import Plan, make_plan
from wanexp.planning.time import TimePrediction, predict_time

Profiles = Sequence[DeviceProfile | None]
"""What is known of each of the devices beside it."""


@dataclass(frozen=True)
class Candidate:
    """One layout on some of the devices. `rejection` is empty where it can run."""

    parallelism: ParallelismConfig
    devices: tuple[Device, ...]
    rejection: str = ""
    plan: Plan | None = None
    memory: tuple[DeviceMemory, ...] = ()
    time: TimePrediction | None = None

    @property
    def name(self) -> str:
        """Such as `block_distribution x 4, interleaved`."""
        return layout_name(self.parallelism, len(self.devices))

    @property
    def settings(self) -> str:
        """The overrides that ask for it."""
        return layout_settings(self.parallelism, self.devices)

    @property
    def samples_per_s(self) -> float:
        assert self.plan and self.time
        return self.plan.batch_size / self.time.step_s

    def summary(self) -> dict[str, Any]:
        """Ready for JSON; GiB and milliseconds."""
        time = self.time if self.time and self.time.is_known else None
        return {
            "layout": self.name,
            "buys": BUYS[self.parallelism.mode],
            "settings": self.settings,
            "feasible": not self.rejection,
            "rejection": self.rejection or None,
            "batch_size": self.plan.batch_size if self.plan else None,
            "devices": [
                {"device": device.label, "free_gib": device.free_bytes / GIB, **memory.summary()}
                for device, memory in zip(self.devices, self.memory, strict=False)
            ],
            "forward_ms": time.forward_s * 1000 if time else None,
            "step_ms": time.step_s * 1000 if time else None,
        }


@dataclass(frozen=True)
class Planned:
    """All layouts, the best for `objective` first, the rejected last."""

    objective: str
    candidates: tuple[Candidate, ...]

    @property
    def winner(self) -> Candidate | None:
        first = self.candidates[0] if self.candidates else None
        return first if first and not first.rejection else None

    @property
    def baseline(self) -> Candidate | None:
        """Mode none, whether it fits or not: what speed-ups are over."""
        return next((c for c in self.candidates if c.parallelism.mode == "none" and c.time), None)

    def speedup(self, candidate: Candidate) -> float | None:
        """Steps a second over mode none; for replicas samples a second."""
        base = self.baseline
        if not (base and base.time and candidate.time and candidate.time.is_known and candidate.plan):
            return None
        return candidate.samples_per_s / base.samples_per_s

    def summary(self) -> dict[str, Any]:
        rows = [candidate.summary() | {"speedup": self.speedup(candidate)} for candidate in self.candidates]
        winner = self.winner
        return {"objective": self.objective, "winner": winner.settings if winner else None, "layouts": rows}


def plan_layouts(config: RunConfig, devices: Sequence[Device], profiles: Profiles) -> Planned:
    """Judge every layout for `config` on `devices`, and rank them. The config's own parallelism is not looked at."""
    by_index = {device.index: profile for device, profile in zip(devices, profiles, strict=True)}
    candidates = []
    for parallelism, chosen in layouts(devices):
        known = [by_index[device.index] for device in chosen]
        candidate = judge(config, parallelism, chosen, known)
        if parallelism.mode == "hybrid" and candidate.plan is None:
            continue  # the modes by name say why; a hybrid would only repeat it
        candidates.append(candidate)
        if split := fitted_split(candidates[-1]):
            fitted = judge(config, dataclasses.replace(parallelism, block_split=split), chosen, known)
            candidates += [] if fitted.rejection else [fitted]
    feasible = [candidate for candidate in candidates if not candidate.rejection]
    rejected = [candidate for candidate in candidates if candidate.rejection]
    feasible.sort(key=RANKINGS[config.objective])
    return Planned(config.objective, (*feasible, *rejected))


def fitted_split(even: Candidate) -> list[int] | None:
    """Blocks for each GPU in proportion to the memory that is left for them, where equal shares do not fit.

    Left: free memory less all that is there without blocks (activations, context, embeddings and head).
    """
    if not even.rejection or not even.plan or even.parallelism.block_placement != "contiguous":
        return None
    blocks, owner = len(even.plan.block_owner), even.plan.block_owner
    if even.plan.layout.blocks < 2:
        return None
    block_bytes = min(entry.weights // owner.count(position) for position, entry in enumerate(even.memory))
    rooms = [
        device.free_bytes - entry.needed + owner.count(position) * block_bytes
        for position, (device, entry) in enumerate(zip(even.devices, even.memory, strict=True))
    ]
    if min(rooms) < block_bytes:
        return None
    split = split_by_weight(blocks, rooms)
    return split if split != [owner.count(position) for position in range(len(rooms))] else None


def judge(
    config: RunConfig, parallelism: ParallelismConfig, devices: Sequence[Device], profiles: Profiles
) -> Candidate:
    """Plan one layout; a layout that makes no sense, or does not fit, is rejected with a sentence."""
    asked = dataclasses.replace(config, parallelism=parallelism)
    try:
        plan = make_plan(asked, devices)
    except LayoutError as error:
        return Candidate(parallelism, tuple(devices), rejection=str(error))
    context = context_bytes(config.hardware, profiles)
    memory = predict_memory(asked, plan, context_bytes=context)
    if config.offload.blocks == "auto":
        plan, memory = _with_least_swap(asked, plan, memory, devices, context)
    time = predict_time(asked, plan, profiles)
    return Candidate(parallelism, tuple(devices), shortage(devices, memory), plan, memory, time)


def _with_least_swap(
    config: RunConfig,
    plan: Plan,
    memory: tuple[DeviceMemory, ...],
    devices: Sequence[Device],
    context: int | None,
) -> tuple[Plan, tuple[DeviceMemory, ...]]:
    """The plan that swaps the fewest blocks with which it fits; with all of them where it never does."""
    for number in range(1, len(plan.block_owner) + 1):
        if not shortage(devices, memory):
            break
        offload = dataclasses.replace(config.offload, blocks=str(number))
        swapping = dataclasses.replace(config, offload=offload)
        plan = make_plan(swapping, devices)
        memory = predict_memory(swapping, plan, context_bytes=context)
    return plan, memory


def context_bytes(hardware: HardwareConfig, profiles: Profiles) -> int | None:
    """The CUDA context's size where a profile has it: of an enforced card, that card's."""
    if hardware.enforce_memory:
        profiles = [hardware.device]
    known = [profile.context_gib for profile in profiles if profile and profile.context_gib]
    return round(max(known) * GIB) if known else None


def shortage(devices: Sequence[Device], memory: Sequence[DeviceMemory]) -> str:
    """What does not fit, in a sentence; empty where everything does. Logical CPU devices share the host's memory."""
    if devices[0].type == "cpu":
        needed, free = sum(entry.needed for entry in memory), min(device.free_bytes for device in devices)
        return f"needs {_gib(needed)} GiB of host memory, {_gib(free)} free" if needed > free else ""
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


def _latency_key(candidate: Candidate) -> tuple[Any, ...]:
    """Seconds a step; of equals to 1 % the fewer GPUs, then the simpler mode (the order of enumeration)."""
    assert candidate.time
    return _rounded(candidate.time.step_s), len(candidate.devices)


def _throughput_key(candidate: Candidate) -> tuple[Any, ...]:
    """Samples a second, the more the better; of equals the fewer GPUs."""
    return _rounded(1 / candidate.samples_per_s), len(candidate.devices)


def _memory_key(candidate: Candidate) -> tuple[Any, ...]:
    """Memory of the fullest device, then seconds a step."""
    assert candidate.time
    return max(entry.needed for entry in candidate.memory), candidate.time.step_s


def _rounded(number: float) -> float:
    """Two significant digits: predictions are no better than that."""
    return float(f"{number:.2g}")


RANKINGS: dict[str, Callable[[Candidate], tuple[Any, ...]]] = {
    "latency": _latency_key,
    "throughput": _throughput_key,
    "memory": _memory_key,
}


def nearest_that_fits(config: RunConfig, devices: Sequence[Device], profiles: Profiles) -> str:
    """The smallest change that makes the run fit on these devices, as a sentence; empty where none was found.

    Tried in this order: another layout, one sample a replica, fewer frames, then how many such GPUs it takes.
    """
    if best := plan_layouts(config, devices, profiles).winner:
        return f"write {best.settings}"
    batch = config.workload.batch_size
    if batch is not None and batch > 1:
        smaller = dataclasses.replace(config, workload=dataclasses.replace(config.workload, batch_size=None))
        if best := plan_layouts(smaller, devices, profiles).winner:
            return f"write workload.batch_size=null {best.settings}"
    words = []
    stride = config.model.vae_stride[0]
    few, many = 0, (config.video.num_frames - 1) // stride  # latent frames less one: what fits, what does not
    winner = _with_frames(config, 1, devices, profiles)
    if winner and many:
        while many - few > 1:
            middle = (few + many) // 2
            if found := _with_frames(config, middle * stride + 1, devices, profiles):
                few, winner = middle, found
            else:
                many = middle
        words.append(f"write video.num_frames={few * stride + 1} {winner.settings}")
    if devices[0].type == "cuda" and (count := _enough_gpus(config, devices[0], profiles[0])):
        words.append(f"block_distribution over {count} such GPUs would hold all of it")
    return "; ".join(words)


def _with_frames(
    config: RunConfig, num_frames: int, devices: Sequence[Device], profiles: Profiles
) -> Candidate | None:
    video = dataclasses.replace(config.video, num_frames=num_frames)
    return plan_layouts(dataclasses.replace(config, video=video), devices, profiles).winner


def _enough_gpus(config: RunConfig, device: Device, profile: DeviceProfile | None) -> int | None:
    """The smallest number of GPUs like `device` over which block distribution fits."""
    for count in range(2, config.model.architecture.num_layers + 1):
        many = [dataclasses.replace(device, index=index) for index in range(count)]
        parallelism = ParallelismConfig(mode="block_distribution", blocks=count)
        if not judge(config, parallelism, many, [profile] * count).rejection:
            return count
    return None


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
    return tuple(
        Device(
            "cuda",
            index,
            profile.name or hardware.name,
            total_bytes=num_bytes,
            free_bytes=num_bytes,
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
