"""What stands in the end table: what a run measured, as far as its record has it."""

import math
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from wanexp.record import Record
from wanexp.terminal.tables import plain_table
from wanexp.tracking import describe

DEVICE_COLUMNS = {  # of the end table: header -> metric of one device, decimals
    "weights\nGiB": ("memory/{}/weights_gib", 2),
    "peak\nGiB": ("memory/{}/peak_allocated_gib", 2),
    "reserved\nGiB": ("memory/{}/peak_reserved_gib", 2),
    "NVML\nGiB": ("memory/{}/nvml_used_gib", 2),
    "busy\n%": ("telemetry/{}/utilization_percent", 0),
    "power\nW": ("telemetry/{}/power_w", 0),
    "SM\nMHz": ("telemetry/{}/sm_clock_mhz", 0),
    "max\nC": ("telemetry/{}/temperature_max_c", 0),
}


def result_rows(record: Record) -> dict[str, str]:
    metrics = record.metrics
    rows: dict[str, str | None] = {}
    for row, name in (("Step time", "step_ms"), ("Forward time", "forward_ms")):
        if (median := metrics.get(f"latency/{name}")) is not None:
            iqr, samples = metrics.get(f"latency/{name}_iqr"), len(record.samples.get(name) or ())
            decimals = max(0, 3 - math.floor(math.log10(median))) if median > 0 else 0
            spread = f" +- {iqr:,.{decimals}f}" if iqr is not None else ""
            details = ["median" if iqr is None else "median +- IQR", f"n = {samples}"][: 1 + bool(samples)]
            rows[row] = f"{median:,.{decimals}f}{spread} ms ({', '.join(details)})"
    rows["Throughput"] = _joined(
        metrics,
        ("throughput/videos_per_hour", "videos/hour"),
        ("throughput/frames_per_second", "frames/s"),
        ("throughput/tokens_per_second", "tokens/s"),
    )
    rows["Kernels"] = _kernels(record.effective) if rows["Throughput"] else None
    rows["Loading"] = describe.loading(metrics)
    rows["Energy"] = _joined(metrics, ("energy/joules_per_step", "J/step"))
    if (mfu := metrics.get("mfu")) is not None:
        rows["MFU"] = f"{100 * mfu:.1f} % of the dense peak"
    rows["Loss"] = _joined(metrics, ("train/loss", "(last step)"))
    if (parity := parity_text(metrics)) is not None:
        error = parity if parity == "bit-equal" else f"relative L2 error {parity}"
        tolerance = record.effective.get("tolerance")
        known = "; ".join(
            filter(
                None,
                (
                    "lossy" if record.effective.get("is_lossy") else None,
                    record.effective.get("verified"),
                    f"tolerance {tolerance:g}" if tolerance else None,
                ),
            )
        )
        rows["Parity"] = f"{error} against mode none" + (f" ({known})" if known else "")
    sent = {
        name.removeprefix("communication/").removesuffix("_gib_per_forward"): value
        for name, value in metrics.items()
        if name.startswith("communication/") and name.endswith("_gib_per_forward") and value
    }
    if sent:
        amounts = ", ".join(f"{axis} {describe.number(value * 1024)} MiB" for axis, value in sent.items())
        by = ", by copy engines" if record.effective.get("transport") == "copies" else ""
        rows["Exchanged"] = f"{amounts} between devices a forward{by}"
    rows["Swapped"] = _joined(
        metrics,
        ("swap/gib_per_forward", "GiB from the host a forward"),
        ("swap/stall_ms_per_step", "ms waited for it a step"),
    )
    rss = {
        name.split("/")[1]: value
        for name, value in metrics.items()
        if name.startswith("memory/rank") and name.endswith("/peak_rss_gib")
    }
    if rss:
        values = ", ".join(f"{rank} {value:.2f}" for rank, value in rss.items())
        rows["Host memory"] = f"{values} GiB (peak RSS)"
    if traces := [name for name in record.artifacts if name.startswith("profile/trace_")]:
        others = f" and {len(traces) - 1} more" if len(traces) > 1 else ""
        rows["Trace"] = f"{traces[0]}{others}, beside the record; https://ui.perfetto.dev shows it"
    return {name: value for name, value in rows.items() if value is not None}


def device_table(metrics: Mapping[str, float]) -> Table | None:
    """One row a device: memory and what it was doing; columns that no device has are left out."""
    labels = dict.fromkeys(
        name.split("/")[1]
        for name in metrics
        if name.startswith(("memory/", "telemetry/")) and name.split("/")[1].startswith(("gpu", "cpu"))
    )
    columns = {
        header: [metrics.get(metric.format(label)) for label in labels]
        for header, (metric, _) in DEVICE_COLUMNS.items()
    }
    columns = {header: values for header, values in columns.items() if set(values) - {None}}
    if not columns:
        return None
    table = plain_table()
    table.add_column("device")
    for header in columns:
        table.add_column(header, justify="right")
    for index, label in enumerate(labels):
        cells = (
            "-" if (value := values[index]) is None else f"{value:.{DEVICE_COLUMNS[header][1]}f}"
            for header, values in columns.items()
        )
        table.add_row(label, *cells)
    return table


def _kernels(effective: Mapping[str, Any]) -> str | None:
    """Such as `attention fa3, sdpa_cudnn to the text; triton between the products`, as far as it is known."""
    own, cross = effective.get("attention"), effective.get("cross_attention")
    if own is None:
        return None
    text = f"attention {own}" + (f", {cross} to the text" if cross not in (None, own) else "")
    return f"{text}; {effective['kernels']} between the products" if effective.get("kernels") else text


def parity_text(metrics: Mapping[str, float]) -> str | None:
    if metrics.get("parity/bit_equal"):
        return "bit-equal"
    error = metrics.get("parity/rel_l2")
    return None if error is None else f"{error:.1e}"


def _joined(metrics: Mapping[str, float], *parts: tuple[str, str]) -> str | None:
    """Those of the metrics that exist, each with its unit."""
    return (
        ", ".join(f"{describe.number(metrics[name])} {unit}" for name, unit in parts if name in metrics)
        or None
    )
