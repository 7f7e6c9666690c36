"""A record in MLflow's words: run name, tags, params, metrics and series. Pure; nothing here needs mlflow.

All of it lives with the records of crashed runs, where almost everything may be missing.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from wanexp.record import Record
from wanexp.tracking.location import without_password

MAX_KEY = 250  # MLflow's limits, in characters
MAX_PARAM = 6000
MAX_TAG = 8000
JOULES_PER_WH = 3600.0
MAX_SERIES_POINTS = 500  # of one telemetry series in MLflow; the record keeps all


TOLD_IN_NAMES = (  # overrides that make other runs of what a name else says
    "precision=",
    "offload",
    "video.",
    "model.",
    "attention=",
    "kernels=",
    "transport=",
    "ffn_chunks=",
    "workload.batch_size=",
    "workload.guidance_scale=",
    "checkpoint=",
)


class Point(NamedTuple):
    """One value of a metric. timestamp in ms since the epoch."""

    key: str
    value: float
    timestamp: int
    step: int


def run_name(record: Record) -> str:
    """The verdict in one line, `tensor_parallel 4 GPUs - 812 ms/step - 7.1 GiB - wan2.1_t2v_14b 480p - precision=fp8`.

    MLflow's table of runs shows nothing else until its reader picks columns.
    """
    metrics = metrics_of(record)
    parts = [" ".join(present(variant(record) or record.name, _count(record)))]
    if record.outcome != "finished":
        parts.append(record.outcome)
    if "latency/step_ms" in metrics:
        parts.append(f"{milliseconds(metrics['latency/step_ms'])}/step")
    if "memory/peak_allocated_gib" in metrics:
        parts.append(gibibytes(metrics["memory/peak_allocated_gib"]))
    parts.append(" ".join(dict.fromkeys(present(group_name(record, "model"), group_name(record, "video")))))
    if (workload := group_name(record, "workload")) not in ("denoise", None):
        parts.append(str(workload))
    told = (text.lstrip("+") for text in record.overrides)
    parts.append(" ".join(text for text in told if text.startswith(TOLD_IN_NAMES)))
    return " - ".join(part for part in parts if part)[:MAX_KEY]


def tags_of(record: Record) -> dict[str, str]:
    """What one groups and searches runs by; the description is apart."""
    tags = {
        "outcome": record.outcome,
        "mode": mode(record),
        "model": group_name(record, "model"),
        "video": group_name(record, "video"),
        "workload": group_name(record, "workload"),
        "precision": record.effective.get("precision") or group_name(record, "precision"),
        "attention": record.effective.get("attention"),
        "hardware": group_name(record, "hardware"),
        "device_type": record.effective.get("device_type"),
        "device": ", ".join(sorted({name for _, name in devices_of(record) if name})),
        "num_devices": num_devices(record),
        "num_gpus": num_gpus(record),
        "weights": weights(record),
        "warnings": len(record.warnings),
        "sweep_id": record.sweep_id,
        "lossy": "true" if record.effective.get("is_lossy") else None,
        "cell": record.cell,
        "repeat": record.repeat,
        "host": mapping(record.environment.get("host")).get("name"),
        "wanexp.run_id": record.run_id,
        "wanexp.schema_version": record.schema_version,
        "mlflow.source.name": "wanexp",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": mapping(record.environment.get("git")).get("commit"),
    }
    return {key: as_text(value)[:MAX_TAG] for key, value in tags.items() if value not in (None, "")}


def params_of(record: Record) -> dict[str, str]:
    """The composed config with dotted keys, and what really ran under `effective.`; long values are cut."""
    found: dict[str, str] = {}
    effective = {
        key: value for key, value in record.effective.items() if key not in ("devices", "attention_probe")
    }
    for key, value in [*flatten(record.requested), *flatten({"effective": effective})]:
        found.setdefault(clean_key(key), cut(without_password(as_text(value)), MAX_PARAM))
    return found


def metrics_of(record: Record) -> dict[str, float]:
    """The record's metrics, the energy of a video, and under `setup/` the numbers one plots them against.

    Finite values only.
    """
    found: dict[str, float] = {}
    derived = setup_of(record)
    if (energy := wh_per_video(record, record.metrics.get("energy/joules_per_step"))) is not None:
        derived["energy/wh_per_video"] = energy
    for key, value in {**derived, **record.metrics}.items():
        if _is_finite(value):
            found.setdefault(clean_key(key), float(value))
    return found


def setup_of(record: Record) -> dict[str, float]:
    """Sizes of the run as numbers: devices, batch, steps, video, tokens of one sample."""
    video, workload = (mapping(record.requested.get(group)) for group in ("video", "workload"))
    found = {
        "setup/num_devices": num_devices(record),
        "setup/num_gpus": num_gpus(record),
        "setup/batch_size": record.effective.get("batch_size", workload.get("batch_size")),
        "setup/num_steps": workload.get("num_steps"),
        "setup/width": video.get("width"),
        "setup/height": video.get("height"),
        "setup/num_frames": video.get("num_frames"),
        "setup/tokens": _num_tokens(record),
    }
    return {key: float(value) for key, value in found.items() if value is not None and _is_finite(value)}


def sampling_steps(record: Record) -> float | None:
    """How many steps make a video; None for training, which makes none."""
    steps = mapping(record.requested.get("model")).get("sampling_steps")
    return float(steps) if steps and group_name(record, "workload") != "train" else None


def wh_per_video(record: Record, joules_per_step: float | None) -> float | None:
    """Energy of a video on all GPUs together; None where that of a step is unknown, and for training.

    A step of replicas computes several samples, so the energy of a step compares no modes.
    """
    if joules_per_step is None or (steps := sampling_steps(record)) is None:
        return None
    return joules_per_step * steps / batch_size(record) / JOULES_PER_WH


def batch_size(record: Record) -> float:
    """Samples that a step computes."""
    return setup_of(record).get("setup/batch_size") or 1.0


def points_of(record: Record) -> Iterator[Point]:
    """Every value for MLflow: metrics, the samples as `steps/...`, telemetry as `system/...`.

    MLflow shows names that begin with `system/` in a tab of their own, and of each the last value: telemetry ends with
    the last timed step, not with a GPU that was given back.
    """
    start, end = start_ms(record), end_ms(record)
    for key, value in metrics_of(record).items():
        yield Point(key, value, end, 0)
    for key, samples in flatten(record.samples):
        if isinstance(samples, (list, tuple)):
            for step, value in enumerate(samples):
                if _is_finite(value):
                    yield Point(clean_key(f"steps/{key.replace('.', '/')}"), float(value), end, step)
    until = _end_of_steps_s(record)
    for key, series in record.telemetry.items():
        rows = [row for row in series if len(row) == 2 and all(map(_is_finite, row)) and row[0] <= until]
        for step, (seconds, value) in enumerate(thin(rows, MAX_SERIES_POINTS)):
            yield Point(clean_key(f"system/{key}"), float(value), start + round(seconds * 1000), step)


def _end_of_steps_s(record: Record) -> float:
    """Seconds from the start of telemetry to the end of the last timed step; infinite unless all were timed."""
    begin = mapping(record.samples.get("phase_s")).get("measure")
    if record.outcome not in ("finished", "inexact") or begin is None:
        return math.inf
    return float(begin) + sum(record.samples.get("step_ms") or []) / 1000


def mode(record: Record) -> str | None:
    """The mode that ran, or the one that was asked for."""
    parallelism = mapping(record.requested.get("parallelism"))
    return record.effective.get("mode") or parallelism.get("mode")


def variant(record: Record) -> str | None:
    """The mode, by its name in conf/parallelism where that says more: `context_parallel_ring`."""
    name = mode(record)
    chosen = dict(text.partition("=")[::2] for text in record.overrides).get("parallelism", "")
    return chosen if name and chosen.startswith(name) else name


def weights(record: Record) -> str:
    """`random` or `checkpoint`."""
    return "checkpoint" if record.requested.get("checkpoint") else "random"


def devices_of(record: Record) -> list[tuple[str, str]]:
    """Label and name of each device that ran, `("gpu0", "NVIDIA H200")`."""
    found = []
    for position, device in enumerate(record.effective.get("devices") or []):
        fields = mapping(device)
        kind = fields.get("type") or record.effective.get("device_type")
        prefix = "cpu" if kind == "cpu" else "gpu"
        label = fields.get("label") or f"{prefix}{fields.get('index', position)}"
        found.append((str(label), str(fields.get("name") or (device if isinstance(device, str) else ""))))
    return found


def num_devices(record: Record) -> int | None:
    """Devices that ran, else those that were asked for; None where neither is known."""
    devices = record.effective.get("devices") or record.requested.get("gpus")
    return len(devices) if devices else None


def num_gpus(record: Record) -> int | None:
    """What the record says; where it says nothing, 0 for logical CPU devices, else the number of devices."""
    said = record.metrics.get("setup/num_gpus")
    if said is not None and _is_finite(said):
        return round(said)
    return 0 if record.effective.get("device_type") == "cpu" else num_devices(record)


def start_ms(record: Record) -> int:
    """Start of the run in ms since the epoch; 0 where the record has no readable time."""
    return _epoch_ms(record.started) or 0


def end_ms(record: Record) -> int:
    """End of the run, not before its start."""
    return max(_epoch_ms(record.ended) or 0, start_ms(record))


def clean_key(key: str) -> str:
    """`key` with what MLflow does not allow replaced by `_`, and no path tricks in it."""
    key = re.sub(r"[^0-9A-Za-z_\-. /:]", "_", key)
    parts = [part for part in key.split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:MAX_KEY] or "_"


def thin(series: Sequence[Any], limit: int) -> Sequence[Any]:
    """At most `limit` evenly spaced entries of `series`, the first and the last among them."""
    if len(series) <= limit:
        return series
    return [series[round(i * (len(series) - 1) / (limit - 1))] for i in range(limit)]


def number(value: float, digits: int = 3) -> str:
    """`0.000120`, `8.10`, `12,345`: so many digits and all before the point; never an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def milliseconds(value: float) -> str:
    """`8.12 ms`, `812 ms`, `12.3 s`: three digits."""
    return f"{number(value / 1000)} s" if value >= 9999.5 else f"{_three_digits(value)} ms"


def gibibytes(value: float) -> str:
    """`7.1 GiB`, `24.5 MiB`."""
    return f"{value:.1f} GiB" if value >= 0.95 else f"{_three_digits(value * 1024)} MiB"


def compared_blocks(record: Record) -> str:
    """`4 of 40 blocks` where the answer was compared over the first blocks alone; else, or if unknown, empty."""
    compared = record.metrics.get("parity/num_blocks")
    total = mapping(mapping(record.requested.get("model")).get("architecture")).get("num_layers")
    return f"{compared:.0f} of {total} blocks" if compared and total and compared < total else ""


def loading(metrics: Mapping[str, float]) -> str | None:
    """`12.3 s, 2.31 GiB/s`, or `weights made in 1.70 s` where nothing was read."""
    seconds, rate = metrics.get("load/seconds"), metrics.get("load/gib_per_second")
    if seconds is None:
        return None
    if metrics.get("load/read_gib") == 0:
        return f"weights made in {number(seconds)} s"
    return f"{number(seconds)} s" + (f", {number(rate)} GiB/s" if rate is not None else "")


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings with dotted keys; lists are leaves, unless they hold mappings."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for index, inner in enumerate(value):
            yield from flatten(inner, f"{prefix}.{index}" if prefix else str(index))
    else:
        yield prefix, value


def _num_tokens(record: Record) -> int | None:
    """Tokens of one sample by the model's strides (patches of 1 x 2 x 2 latent cells)."""
    video, model = (mapping(record.requested.get(group)) for group in ("video", "model"))
    try:
        frames, rows, columns = (int(stride) for stride in model["vae_stride"])
        latent_frames = (int(video["num_frames"]) - 1) // frames + 1
        return latent_frames * (int(video["height"]) // rows // 2) * (int(video["width"]) // columns // 2)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def group_name(record: Record, group: str) -> str | None:
    """Name of the option chosen in a config group."""
    name = mapping(record.requested.get(group)).get("name")
    return str(name) if name else None


def _count(record: Record) -> str | None:
    """`2 GPUs`, `2 CPU`; of a run that did not get as far as its devices, what the config asks for."""
    count = num_devices(record)
    if count is None:
        return None
    asked = mapping(record.requested.get("hardware")).get("device_type")
    on_cpu = (record.effective.get("device_type") or asked) == "cpu"
    return f"{count} CPU" if on_cpu else plural(count, "GPU")


def mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def present(*values: Any) -> list[str]:
    return [str(value) for value in values if value]


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def plural(count: int, noun: str) -> str:
    """`1 cell`, `3 cells`."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 4] + " ..."


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"


def _epoch_ms(moment: str | None) -> int | None:
    try:
        when = datetime.fromisoformat(moment or "")
        return round((when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() * 1000)
    except (TypeError, ValueError):
        return None
