"""What stands on the start card: what is about to run, and which device holds what."""

from collections.abc import Sequence
from itertools import pairwise

from rich.table import Table

from wanexp.config import RunConfig
from wanexp.planning.plan import Plan, is_lossy_run
from wanexp.terminal.tables import plain_table
from wanexp.workloads.schedule import warmup_steps
from wanexp.workloads.sizes import forwards_per_step, guidance_of, num_tokens

GIB = 1024**3


def card_rows(config: RunConfig, plan: Plan, weights: str) -> dict[str, str]:
    model, video, workload = config.model, config.video, config.workload
    experts = f"{model.num_experts} experts of " if model.num_experts > 1 else ""
    seconds = video.num_frames / video.fps
    timed, warmup = (
        _plural(workload.num_steps, "timed step"),
        _plural(len(warmup_steps(config)), "warm-up step"),
    )
    how = f"learning rate {workload.learning_rate:g}" if workload.name == "train" else _guidance(config)
    residual = ", fp32 residuals" if config.precision.residual_fp32 else ""
    return {
        "Model": f"{model.name}, {experts}{_parameters(model.architecture.num_parameters())}",
        "Weights": f"random (seed {config.seed})" if weights == "random" else weights,
        "Video": f"{video.width} x {video.height}, {video.num_frames} frames "
        f"({seconds:.1f} s at {video.fps} fps), {num_tokens(model, video):,} tokens",
        "Workload": f"{workload.name}, {timed} after {warmup}",
        "Batch": f"{_plural(plan.batch_size, 'sample')}, {how}",
        "Mode": f"{plan.mode}: {plan.layout}, {_plural(len(plan.ranks), 'process', 'es')}",
        "Precision": f"{config.precision.dtype}{residual}{_lossy_text(config)}; attention {config.attention}",
        **_offload_text(config, plan),
        "Devices": _devices_text(config, plan),
    }


def _offload_text(config: RunConfig, plan: Plan) -> dict[str, str]:
    """The row of the card that says what lives on the host; none where nothing does."""
    if not plan.swapped:
        return {}
    away, total = len(plan.swapped), len(plan.block_owner)
    return {"Offload": f"{away} of {total} blocks on the host, {config.offload.buffers} buffers a device"}


def _lossy_text(config: RunConfig) -> str:
    if not is_lossy_run(config):
        return ""
    linear = config.precision.linear
    return ", lossy" if linear == "dtype" else f", {linear} linear layers: lossy"


def _devices_text(config: RunConfig, plan: Plan) -> str:
    names = list(dict.fromkeys(device.name for device in plan.devices))
    if plan.device_type == "cpu":
        why = "hardware=cpu" if config.hardware.device_type == "cpu" else "no GPU found"
        cpu = names[0].removeprefix("logical CPU device of ")
        memory = plan.devices[0].total_bytes / GIB
        return f"{why}: these are logical CPU devices, which share the {memory:.0f} GiB of this host ({cpu})"
    counts = (f"{sum(device.name == name for device in plan.devices)} x {name}" for name in names)
    text = ", ".join(counts)
    if len(plan.devices) > 1:
        indices = {device.index for device in plan.devices}
        missing = any(indices - {device.index} - set(device.peers) for device in plan.devices)
        text += "; no P2P between some of them" if missing else "; P2P between all"
    return text


def _guidance(config: RunConfig) -> str:
    scales = guidance_of(config)
    if forwards_per_step(config) == 1:
        return "no CFG (1 forward a step)"
    return f"CFG {' / '.join(f'{scale:g}' for scale in scales)} (2 forwards a step)"


def placement_table(plan: Plan) -> Table:
    """Device -> what it holds."""
    table = plain_table()
    for name in ("device", "rank", "blocks", "samples", "weights GiB", "free GiB"):
        table.add_column(name, justify="left" if name in ("device", "blocks") else "right")
    for rank in plan.ranks:
        samples = block_ranges(range(rank.first_sample, rank.first_sample + rank.num_samples))
        for position, device_position in enumerate(rank.devices):
            device = plan.devices[device_position]
            blocks = [block for block, owner in enumerate(plan.block_owner) if owner == position]
            table.add_row(
                device.label,
                str(rank.rank),
                block_ranges(blocks),
                samples,
                f"{plan.weight_bytes[device_position] / GIB:.2f}",
                f"{device.free_bytes / GIB:.2f}",
            )
    return table


def block_ranges(blocks: Sequence[int]) -> str:
    """Such as "0-9", "0-3, 8" or, dealt out with a constant stride, "0, 4, ..., 36"."""
    blocks = sorted(blocks)
    if not blocks:
        return "none"
    strides = {second - first for first, second in pairwise(blocks)}
    if len(blocks) > 2 and len(strides) == 1 and strides != {1}:
        shown = [str(block) for block in blocks]
        return ", ".join(shown if len(shown) <= 4 else [*shown[:2], "...", shown[-1]])
    ranges: list[list[int]] = []
    for block in blocks:
        if ranges and block == ranges[-1][1] + 1:
            ranges[-1][1] = block
        else:
            ranges.append([block, block])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ranges)


def _parameters(count: int) -> str:
    return f"{count / 1e9:.2f} B parameters" if count >= 1e9 else f"{count / 1e6:.1f} M parameters"


def _plural(count: int, noun: str, ending: str = "s") -> str:
    return f"{count} {noun}{ending if count != 1 else ''}"
