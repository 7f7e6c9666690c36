"""What `task=plan` prints: the layouts that were weighed, as a table."""

from collections.abc import Sequence

from rich.text import Text

from wanexp.config import RunConfig
from wanexp.hardware.devices import Device
from wanexp.offload.sizes import LINEARS
from wanexp.planning.candidates import Candidate, Planned
from wanexp.planning.layouts import BUYS
from wanexp.terminal.console import TOO_LARGE_ON_CPU, Console
from wanexp.terminal.start_card import GIB
from wanexp.terminal.tables import LABEL_WIDTH, facts, plain_table
from wanexp.workloads.sizes import guidance_of, num_tokens

ROOM_FOR_BUYS = 110  # columns of a terminal that show what a layout buys, too
SMALLER = "take a smaller video, batch or model"


def print_plan_table(
    console: Console,
    config: RunConfig,
    devices: Sequence[Device],
    planned: Planned,
    advice: str = "",
) -> None:
    """What the layouts would need (task=plan), the best first, and why others cannot run."""
    screen = console.rich
    names = ", ".join(dict.fromkeys(device.name for device in devices))
    free = [device.free_bytes / GIB for device in devices]
    memory = f"{min(free):.1f}" if max(free) - min(free) < 0.05 else f"{min(free):.1f} to {max(free):.1f}"
    on_gpu = devices[0].type == "cuda"
    described = facts()
    described.add_row("Model", f"{config.model.name}, {config.precision.name}, {config.workload.name}")
    described.add_row("Video", f"{config.video.name}, {num_tokens(config.model, config.video):,} tokens")
    described.add_row(
        "Devices", f"{len(devices)} x {names}, {memory} GiB free" + ("" if on_gpu else " for all")
    )
    written = not_by_default(config)
    if written:
        described.add_row("Settings", written)
    if planned.objective != config.objective:
        described.add_row("Ranked by", f"{planned.objective}: in training nobody waits for one sample")
    screen.print(described)
    screen.print()
    shown = planned.digest()
    swaps = any(candidate.host_bytes for candidate in shown)
    columns = ["layout", "buys", "needs GiB", "on host", "step ms", "speed-up", "verdict"]
    if not swaps:
        columns.remove("on host")
    has_room = screen.width >= ROOM_FOR_BUYS
    if not has_room:
        columns.remove("buys")
    table = plain_table()
    for name in columns:
        is_text = name in ("layout", "buys", "verdict")
        table.add_column(
            name,
            justify="left" if is_text else "right",
            no_wrap=name != "layout",
            overflow="fold",
            min_width=18 if name == "layout" else None,
        )
    for candidate in shown:
        row = _plan_row(planned, candidate, has_room=has_room)
        table.add_row(*(row[name] for name in columns))
    screen.print(table)
    screen.print()
    for candidate in shown:
        if candidate.rejection:
            screen.print(f"{candidate.name}: {candidate.rejection}")
    if left_out := len(planned.candidates) - len(shown):
        screen.print(
            f"Shown: the best of each mode, and of the products of several. {left_out} more layouts were weighed; "
            "plan_json=true has all."
        )
    of_what = (
        "the fullest GPU, CUDA context included" if on_gpu else "all devices, which share this host's memory"
    )
    each = ", one sample each" if config.workload.batch_size is None else ""
    screen.print(
        f"needs GiB: predicted peak of {of_what}. speed-up: over mode none; of replicas in samples a second{each}."
        + (" on host: blocks that each process swaps, and the host's memory that this takes in all." * swaps)
    )
    winner, asked = planned.winner, planned.asked
    rows = []
    if winner:
        rows.append(
            (
                "Ranked first" if planned.note else f"Best for {planned.objective}",
                f"{written} {winner.settings}".lstrip(),
            )
        )
    elif advice:
        rows.append(("Would fit", advice))
    else:
        rows.append(("Nothing fits", SMALLER if on_gpu else TOO_LARGE_ON_CPU))
    if asked and not asked.rejection:
        rows.append(("Asked for", f"{written} {asked.settings}".lstrip()))
    width = max(LABEL_WIDTH, *(len(name) for name, _ in rows))
    for name, value in rows:  # never wrapped, to be copied
        screen.print(Text.assemble((f"{name:<{width}}", "bold"), f"  {value}"), soft_wrap=True)
    if planned.note:
        screen.print(Text.assemble(("Note", "bold"), f"{'':<{width - 2}}{planned.note}"))


def not_by_default(config: RunConfig) -> str:
    """What of the settings that decide what fits, and how fast, is not the default, as overrides.

    Model, video and hardware are left out: the table names them above.
    """
    offload, precision, workload = config.offload, config.precision, config.workload
    usual_blocks = "auto" if offload.name == "block_swap" else "0"
    usual_linear = precision.name if precision.name in LINEARS else "dtype"
    has_guidance = workload.name == "denoise" and guidance_of(config) != config.model.guidance_scale
    scales = ",".join(f"{scale:g}" for scale in guidance_of(config))
    overrides = (
        (workload.name != "denoise", f"workload={workload.name}"),
        (workload.batch_size is not None, f"workload.batch_size={workload.batch_size}"),
        (not workload.activation_checkpointing, "workload.activation_checkpointing=false"),
        (offload.name != "none", f"offload={offload.name}"),
        (offload.blocks != usual_blocks, f"offload.blocks={offload.blocks}"),
        (offload.buffers != 2, f"offload.buffers={offload.buffers}"),
        (precision.name != "bf16", f"precision={precision.name}"),
        (precision.linear != usual_linear, f"precision.linear={precision.linear}"),
        (precision.residual_fp32, "precision.residual_fp32=true"),
        (has_guidance, f"'workload.guidance_scale=[{scales}]'"),
        (config.attention != "auto", f"attention={config.attention}"),
        (config.kernels != "auto", f"kernels={config.kernels}"),
        (config.transport != "auto", f"transport={config.transport}"),
        (config.ffn_chunks != 1, f"ffn_chunks={config.ffn_chunks}"),
    )
    return " ".join(text for is_written, text in overrides if is_written)


def _plan_row(planned: Planned, candidate: Candidate, *, has_room: bool) -> dict[str, Text]:
    needs = f"{candidate.needed_bytes / GIB:.1f}" if candidate.memory else ""
    swapped = len(candidate.plan.swapped) if candidate.plan else 0
    blocks = f"{swapped} blocks" if has_room else swapped
    time = candidate.time if candidate.time and candidate.time.is_known else None
    speedup = planned.speedup(candidate)
    best = "first" if planned.note else "best"
    verdict = "no" if candidate.rejection else best if candidate is planned.winner else "fits"
    verdict += ", asked for" if candidate is planned.asked else ""
    return {
        "layout": Text(candidate.name),
        "buys": Text(BUYS[candidate.parallelism.mode]),
        "needs GiB": Text(needs),
        "on host": Text(f"{blocks}, {candidate.host_bytes / GIB:.1f} GiB" if swapped else ""),
        "step ms": Text(f"{time.step_s * 1000:,.0f}" if time else "?"),
        "speed-up": Text(f"{speedup:.2f}x" if speedup else "?"),
        "verdict": Text(verdict, style="yellow" if candidate.rejection else "green"),
    }
