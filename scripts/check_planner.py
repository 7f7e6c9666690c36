#!/usr/bin/env python
"""Is the planner right? Its predictions beside what was measured, and its verdicts put to the test.

    python scripts/check_planner.py run            # on one or two GPUs: runs the cells, some under enforced caps
    python scripts/check_planner.py table multirun docs/results/planner.md     # from the records, anywhere
    python scripts/check_planner.py layouts \\
        docs/results/{layouts_2gpus_older,layouts_{2,4}gpus,models_2gpus,h100,sweeps/{modes,scaling}_*/runs}.json \\
        docs/results/planner.md  # the section on fused kernels

The cells of `run` measure peak and step time at several sizes. Its caps (hardware.enforce_memory) stand just below and
just above the predicted need of a device: below, the plan says that the run cannot fit, and forced to start it must
run out of memory; above it must finish.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import fill
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works without an installation, too

from hydra import compose, initialize_config_dir

from wanexp.config import conf_dir, register
from wanexp.config_reading import run_config_from_dict, to_run_config
from wanexp.errors import UserError
from wanexp.hardware.devices import device_from_dict
from wanexp.hardware.profiles import profile_for
from wanexp.plan_task import devices_to_plan
from wanexp.planning.memory import predict_memory
from wanexp.planning.plan import make_plan
from wanexp.planning.time import predict_time
from wanexp.record import Record, read_record

# Overrides of each sweep: GPUs that it needs, what it runs
CAPS = (
    (
        2,
        ["model=wan2.1_t2v_14b", "parallelism=block_distribution", "gpus=[0,1]"],
        (15.8, 16.0, 16.2, 16.5, 16.7, 17.0),
    ),
    (1, ["model=wan2.1_t2v_1.3b", "parallelism=none", "gpus=[0]"], (4.0, 4.1, 4.2, 4.4, 4.5, 4.7)),
)
CELLS = (
    (1, ["model=wan2.1_t2v_14b", "video=720p", "parallelism=none", "gpus=[0]", "workload.num_steps=1"]),
    (
        2,
        [
            "model=wan2.1_t2v_14b",
            "video=720p",
            "parallelism=block_distribution",
            "gpus=[0,1]",
            "workload.num_steps=1",
        ],
    ),
    (1, ["model=wan2.1_t2v_1.3b", "video=720p", "parallelism=none", "gpus=[0]"]),
    (
        2,
        ["model=wan2.1_t2v_1.3b", "video=720p", "parallelism=block_distribution,data_parallel", "gpus=[0,1]"],
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--gpus", type=int, default=2, help="GPUs at hand; cells that need more are left out")
    table = commands.add_parser("table")
    table.add_argument(
        "records", type=Path, nargs="+", help="folders that hold records, and last the Markdown file"
    )
    layouts = commands.add_parser("layouts")
    layouts.add_argument(
        "results",
        type=Path,
        nargs="+",
        help="JSON files of runs, of bench_layouts.py or sweeps, and last the Markdown file",
    )
    options = parser.parse_args()
    register()
    if options.command == "run":
        run_all(options.gpus)
        return 0
    if options.command == "layouts":
        *results, out = options.results
        before, _, rest = (out.read_text() if out.exists() else "").partition(FUSED_HEADING)
        after = "".join(rest.partition("\n## ")[1:])  # what was written by hand below it stays
        section = f"{FUSED_HEADING}{layouts_markdown(results, out)}"
        out.write_text(f"{before.rstrip()}\n\n{section}{after}".lstrip())
    else:
        *folders, out = options.records
        kept = out.read_text().partition(FUSED_HEADING)[1:] if out.exists() else ()
        out.write_text(f"{markdown(list(find_records(folders)))}\n{''.join(kept)}".rstrip() + "\n")
    print(out.read_text())
    return 0


FUSED_HEADING = "## Fused kernels\n"
GOAL_PERCENT = 10  # error of a step's time
PAGE_WIDTH = 140  # characters


def layouts_markdown(results: list[Path], out: Path) -> str:
    """For the file `out`: what this planner says to the overrides of each run, beside what the run measured."""
    rows: list[str] = []
    peak_errors: list[float] = []
    step_errors: list[float] = []
    far_off: list[str] = []
    for path in results:
        source = path.parent.name if path.stem == "runs" else path.stem
        for run in json.loads(path.read_text())["runs"]:
            if run["outcome"] == "finished":
                # Runs that do not tell are older than any choice of transports.
                transport = run.get("effective", {}).get("transport") or "collectives"
                cells, peak_error, step_error = layout_row(
                    [*run["overrides"], f"transport={transport}"], run["metrics"], run.get("devices")
                )
                rows.append(f"| {' | '.join([source, *cells])} |")
                peak_errors.append(peak_error)
                step_errors.append(step_error)
                if abs(step_error) > GOAL_PERCENT:
                    num_gpus = round(run["metrics"]["setup/num_gpus"])
                    far_off.append(f"{cells[0]} on {num_gpus} GPUs ({step_error:+.1f} %)")
    places = [path.relative_to(out.parent) if path.is_relative_to(out.parent) else path for path in results]
    prose = (
        "Fused kernels and fa3 on one to four H200 and on one H100, as `scripts/bench_layouts.py` and sweeps "
        f"measured them in {', '.join(f'[{path}]({path})' for path in places)}. Predicted by the planner as it is, "
        "from the overrides and the profile: `scripts/check_planner.py layouts` makes this table. Peaks: GiB of each "
        "GPU.",
        "Rows without a mode are of mode none, rows without a video of 480p; hybrid has cfg=2 where nothing else is "
        "said.",
        f"**Peaks** of {len(rows)} runs: {min(peak_errors):+.1f} to {max(peak_errors):+.1f} %, in "
        f"{sum(error > 0 for error in peak_errors)} of them predicted too high. **Times**: "
        f"{len(rows) - len(far_off)} within {GOAL_PERCENT} %, {statistics.median(step_errors):+.1f} % in the median of "
        f"all. Further off: {'; '.join(far_off) or 'none'}.",
    )
    lines = [
        *(f"\n{fill(text, PAGE_WIDTH, break_long_words=False, break_on_hyphens=False)}" for text in prose),
        "",
        "| run of | model, video, mode | predicted peak | measured | worst error | predicted ms | measured | error |",
        "|" + " --- |" * 8,
        *rows,
        "",
    ]
    return "\n".join(lines)


def in_words(override: str) -> str:
    """`context_parallel`, `ring=4`."""
    key, _, value = override.partition("=")
    return value if "." not in key else f"{key.rpartition('.')[2]}={value}"


def layout_row(
    overrides: list[str], metrics: dict[str, float], ran_on: list[dict[str, Any]] | None
) -> tuple[list[str], float, float]:
    """The row's cells after the first, and errors in percent: of the peak that is further off, and of the step.

    ran_on: the run's devices; None: H200.
    """
    num_gpus = round(metrics["setup/num_gpus"])
    beside = ("gpus=", "hardware=", "+sweep=", "sweep_report=", "resume=", "tracking=")
    asked = [override for override in overrides if not override.startswith(beside)]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        machine = ["hardware=2x_h200", f"hardware.num_devices={num_gpus}"]
        config = to_run_config(compose("config", overrides=[*asked, *machine]))
    if ran_on:
        device = device_from_dict({"free_bytes": 0, **ran_on[0]})
        config.hardware.device = profile_for(config.hardware, device, conf_dir())
    devices = devices_to_plan(config)
    plan = make_plan(config, devices)
    profiles = [profile_for(config.hardware, device, conf_dir()) for device in devices]
    peaks = [memory.allocated / 1024**3 for memory in predict_memory(config, plan)]
    found = [
        metrics[name] for name in sorted(metrics) if re.fullmatch(r"memory/gpu\d+/peak_allocated_gib", name)
    ]
    step_ms, found_ms = predict_time(config, plan, profiles).step_s * 1000, metrics["latency/step_ms"]
    peak_error = max((100 * (a / b - 1) for a, b in zip(peaks, found, strict=True)), key=abs)
    step_error = 100 * (step_ms / found_ms - 1)
    hidden = ("workload.num_warmup_steps=", "workload.num_steps=", "transport=", "verify=")
    cells = [
        ", ".join(in_words(override) for override in asked if not override.startswith(hidden)),
        " / ".join(f"{peak:.2f}" for peak in peaks),
        " / ".join(f"{peak:.2f}" for peak in found),
        f"{peak_error:+.1f} %",
        f"{step_ms:,.0f}",
        f"{found_ms:,.0f}",
        f"{step_error:+.1f} %",
    ]
    return cells, peak_error, step_error


def run_all(num_gpus: int) -> None:
    """Every sweep that these GPUs allow. A cell that fails is a result."""
    for needed, overrides, caps in CAPS:
        if needed <= num_gpus:
            memory = ",".join(str(cap) for cap in caps)
            profile = ["hardware=2x_h200", f"hardware.num_devices={num_gpus}", "hardware.enforce_memory=true"]
            steps = ["workload.num_warmup_steps=0", "workload.num_steps=1"]
            sweep(
                "caps", [*overrides, *profile, f"hardware.device.memory_gib={memory}", "force=true", *steps]
            )
    for needed, overrides in CELLS:
        if needed <= num_gpus:
            sweep("cells", ["workload.num_steps=2", *overrides])


def sweep(name: str, overrides: list[str]) -> None:
    """One multirun; its records stay under multirun/."""
    name = f"planner_{name}_{time.strftime('%H%M%S')}"
    fixed = ["video=480p", "verify=never", "tracking=none", f"sweep_name={name}"]
    chosen = {
        override.partition("=")[0]: override for override in (*fixed, *overrides)
    }  # the last one counts
    subprocess.run([sys.executable, "-m", "wanexp", "-m", *chosen.values()], cwd=ROOT, check=False)


def find_records(folders: list[Path]) -> Iterator[Record]:
    for folder in folders:
        for path in sorted(folder.rglob("record.json")):
            try:
                yield read_record(path)
            except UserError as error:
                print(f"left out: {error}", file=sys.stderr)


def markdown(records: list[Record]) -> str:
    """Both tables, from whatever records there are."""
    gpus = {device["name"] for record in records for device in record.effective.get("devices", ())}
    dates = sorted({record.started[:10] for record in records})
    lines = [
        "# The planner against the machine",
        "",
        f"Measured {', '.join(dates)} on {', '.join(sorted(gpus))}, precision bf16, random weights; rates of the "
        "profile as `scripts/calibrate.py` measured them. Peak: torch's allocated bytes on the fullest GPU. Error: "
        "predicted over measured, less one.",
        "",
        "| model | video | workload | mode | GPUs | predicted peak GiB | measured | error | predicted step ms "
        "| measured | error |",
        "|" + " --- |" * 11,
    ]
    for record in records:
        if (
            not is_capped(record)
            and record.outcome == "finished"
            and "plan/predicted_peak_gib" in record.metrics
        ):
            lines.append(prediction_row(record))
    lines += [
        "",
        "## Verdicts under enforced caps",
        "",
        "Each GPU may use no more than the cap (with the CUDA context in it); the run is forced to start.",
        "",
        "| model | mode | GPUs | predicted need GiB | cap GiB | the plan says | the run ended |",
        "|" + " --- |" * 7,
    ]
    lines += [cap_row(record) for record in records if is_capped(record)]
    return "\n".join([*lines, ""])


def is_capped(record: Record) -> bool:
    return bool(record.requested["hardware"].get("enforce_memory"))


def prediction_row(record: Record) -> str:
    config = run_config_from_dict(record.requested)
    config.parallelism.mode = record.effective["mode"]
    devices = [device_from_dict(device) for device in record.effective["devices"]]
    plan = make_plan(config, devices)
    profiles = [profile_for(config.hardware, device, conf_dir()) for device in devices]
    peak = max(memory.allocated for memory in predict_memory(config, plan)) / 1024**3
    step_ms = predict_time(config, plan, profiles).step_s * 1000
    measured_peak, measured_ms = (
        record.metrics["memory/peak_allocated_gib"],
        record.metrics["latency/step_ms"],
    )
    cells = [
        config.model.name,
        config.video.name,
        config.workload.name,
        plan.mode,
        str(len(devices)),
        f"{peak:.2f}",
        f"{measured_peak:.2f}",
        f"{100 * (peak / measured_peak - 1):+.1f} %",
        f"{step_ms:,.0f}",
        f"{measured_ms:,.0f}",
        f"{100 * (step_ms / measured_ms - 1):+.1f} %",
    ]
    return "| " + " | ".join(cells) + " |"


def cap_row(record: Record) -> str:
    prediction = record.plan.get("prediction", {})
    need = max((device["needed_gib"] for device in prediction.get("devices", ())), default=float("nan"))
    cells = [
        record.requested["model"]["name"],
        record.effective.get("mode", record.requested["parallelism"]["mode"]),
        str(record.effective.get("num_gpus", "")),
        f"{need:.2f}",
        f"{record.requested['hardware']['device']['memory_gib']:g}",
        "fits" if prediction.get("feasible") else "cannot fit",
        record.outcome,
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
