"""From records to cells: repeats grouped by what was asked for, and named by what tells them apart.

A record (record.json) is the truth. `sweep.json` adds the order, and the cells that have no record. Of a record's
telemetry only the memory is kept, thinned, so that a thousand long runs fit in memory.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from wanexp.config import AUTO_MODE
from wanexp.errors import UserError
from wanexp.record import FILE_NAME, Record, read_record
from wanexp.report.cells import Cell, Run, Sweep
from wanexp.tracking import describe
from wanexp.tracking.location import without_password

SWEEP_FILE = "sweep.json"
MAX_POINTS = 400  # of a memory series
NOT_SETTINGS = (  # keys that do not change what is measured
    "sweep_name",
    "tracking.",
    "limits.",
    "verify",
    "profile",
    "force",
    "task",
    "plan_json",
    "repeats",
    "resume",
    "sweep_order",
    "sweep_report",
    "hardware.usd_per_gpu_hour",
)
DEGREES = ("dp", "cfg", "ring", "ulysses", "tp", "shard", "blocks")
IN_TITLE = ("model", "video", "workload")  # these make the setting, not the cell


def read_sweep(folder: Path) -> Sweep:
    """The sweep in `folder`, or any tree of records. Raises UserError where there is none, or one is unreadable."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; write the folder of a sweep, such as multirun/NAME")
    document: dict[str, Any] = {}
    if (folder / SWEEP_FILE).is_file():
        try:
            document = json.loads(without_password((folder / SWEEP_FILE).read_text()))
        except ValueError as error:
            raise UserError(f"{folder / SWEEP_FILE} is not readable: {error}") from None
    entries = entries_of(document)
    places = [folder / entry["folder"] for entry in entries if entry.get("folder")]
    paths = [place / FILE_NAME for place in places if (place / FILE_NAME).is_file()]
    paths = list(dict.fromkeys(paths)) if entries else sorted(folder.rglob(FILE_NAME))
    if not paths and not entries:
        raise UserError(f"there is no {FILE_NAME} below {folder}; write the folder of a sweep")
    runs = [Run(lighten(read_record(path)), path.parent) for path in paths]
    with_record = {path.parent for path in paths}
    absent = without_runs(entries, [folder / str(entry.get("folder")) in with_record for entry in entries])
    sweep_id = str(document.get("sweep_id") or folder.resolve().name)
    return Sweep(sweep_id, make_cells(runs, absent), folder, document)


def entries_of(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs that a sweep.json lists: repeats of a cell together, cells in the order of the command."""
    found = document.get("runs") or document.get("cells") or []
    entries = [entry for entry in found if isinstance(entry, dict)]
    return sorted(
        entries, key=lambda entry: entry["index"] if isinstance(entry.get("index"), int) else len(entries)
    )


def without_runs(entries: Sequence[dict[str, Any]], ran: Sequence[bool]) -> list[dict[str, Any]]:
    """One entry for each cell of which no repeat has a record; `ran` says which entries have one."""

    def cell_of(entry: Mapping[str, Any]) -> str:
        return str(entry.get("cell") or sorted(entry.get("overrides") or []))

    done = {cell_of(entry) for entry, has_run in zip(entries, ran, strict=True) if has_run}
    return list({cell_of(entry): entry for entry in entries if cell_of(entry) not in done}.values())


def lighten(record: Record) -> Record:
    """`record` without the telemetry that no figure shows, and the rest of it thinned."""
    kept = {
        name: list(describe.thin(series, MAX_POINTS))
        for name, series in record.telemetry.items()
        if name.endswith("/memory_used_gib")
    }
    return replace(record, telemetry=kept)


def make_cells(runs: Iterable[Run], absent: Sequence[Mapping[str, Any]] = ()) -> list[Cell]:
    """Cells in order of their first run; then those that have no record, `absent` (entries of sweep.json)."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(identity(run.record), []).append(run)
    cells = [_cell_of(group) for group in groups.values()]
    _split_settings(cells)
    _name_options(cells)
    settings = {cell.setting for cell in cells}
    setting = settings.pop() if len(settings) == 1 else ""
    common = set.intersection(*(set(cell.overrides) for cell in cells)) if cells else set()
    return cells + [_absent_cell(entry, setting, common) for entry in absent]


def settings_of(record: Record) -> dict[str, str]:
    """What decides the numbers of a run, flat: its config less what only says where results go."""
    flat = dict(describe.flatten(record.requested))
    if "objective" in flat and not _is_planned(record):
        flat["objective"] = None  # nobody was asked to rank by it
    return {
        key: describe.as_text(value)
        for key, value in flat.items()
        if not any(key == name or (name.endswith(".") and key.startswith(name)) for name in NOT_SETTINGS)
    }


def _is_planned(record: Record) -> bool:
    """Whether the planner chose the layout."""
    return describe.mapping(record.requested.get("parallelism")).get("mode") == AUTO_MODE


def identity(record: Record) -> str:
    """Equal for repeats of a cell."""
    return json.dumps(settings_of(record), sort_keys=True)


def setting_of(record: Record) -> str:
    """`wan2.1_t2v_14b 480p`, with the workload unless it is denoise."""
    names = [describe.group_name(record, group) for group in IN_TITLE]
    return " ".join(dict.fromkeys(name for name in names if name and name != "denoise")) or record.name


def work_of(record: Record) -> dict[str, str]:
    """How much a step computes, by parts: size of the video, architecture, forwards."""
    flat = dict(describe.flatten(record.requested))
    video = [flat.get(f"video.{name}") for name in ("width", "height", "num_frames")]
    asked, usual = (describe.mapping(record.requested.get(group)) for group in ("workload", "model"))
    scales = asked.get("guidance_scale") or usual.get("guidance_scale") or []
    return {
        "video": "x".join(map(str, video)),
        "guidance": "guided" if max(scales, default=1) > 1 else "not guided",
        **{
            key.removeprefix("model.architecture."): f"{key.removeprefix('model.architecture.')}={value}"
            for key, value in flat.items()
            if key.startswith("model.architecture.")
        },
    }


def _split_settings(cells: Sequence[Cell]) -> None:
    """Cells of one model, video and workload by name are of several settings where overrides change the work."""
    for setting in {cell.setting for cell in cells}:
        alike = [cell for cell in cells if cell.setting == setting]
        work = [work_of(cell.record) for cell in alike]
        varying = _varying(work)
        for cell, parts in zip(alike, work, strict=True):
            cell.setting = " ".join([setting, *(text for name, text in parts.items() if name in varying)])


def _cell_of(runs: list[Run]) -> Cell:
    outcomes = [run.record.outcome for run in runs]
    outcome = "finished" if "finished" in outcomes else outcomes[-1]
    record = next(run.record for run in reversed(runs) if run.record.outcome == outcome)
    return Cell(
        mode=describe.mode(record) or record.name,
        num_devices=describe.num_devices(record) or 0,
        setting=setting_of(record),
        runs=runs,
        outcome=outcome,
        reason=record.message,
        overrides=record.overrides,
    )


def _absent_cell(entry: Mapping[str, Any], setting: str, common: Set[str]) -> Cell:
    """A cell that was never run, or whose record is gone, as far as its overrides tell.

    setting: that of the sweep, where it has one. common: overrides of all cells, which tell none apart.
    """
    overrides = [str(text) for text in entry.get("overrides") or []]
    chosen = dict(text.lstrip("+").partition("=")[::2] for text in overrides)
    gpus = chosen.get("gpus", "").strip("[]")
    mode = (
        chosen.get("parallelism")
        or chosen.get("parallelism.mode")
        or str(entry.get("name") or "?").split()[0]
    )
    hidden = ("parallelism", "parallelism.mode", "gpus", "sweep", "sweep_name", "model", "video", "workload")
    outcome = str(entry.get("outcome") or "waiting")
    return Cell(
        mode=mode,
        num_devices=len(gpus.split(",")) if gpus and gpus != "null" else 0,
        setting=setting or " ".join(chosen[group] for group in IN_TITLE if group in chosen),
        options=", ".join(
            f"{key}={value}"
            for key, value in (
                text.lstrip("+").partition("=")[::2] for text in overrides if text not in common
            )
            if key not in hidden
        ),
        outcome="no record" if outcome == "finished" else outcome,
        reason=str(entry.get("reason") or entry.get("message") or ""),
        overrides=overrides,
    )


def _name_options(cells: Sequence[Cell]) -> None:
    """Give each cell what tells it from others of its setting: its degrees, other settings, and the GPUs' names where
    nothing else does."""
    flats = {id(cell): settings_of(cell.record) for cell in cells}
    for setting in {cell.setting for cell in cells}:
        alike = [cell for cell in cells if cell.setting == setting]
        common = _varying([flats[id(cell)] for cell in alike])
        for mode in {cell.mode for cell in alike}:
            own = [cell for cell in alike if cell.mode == mode]
            placed = {key for key in _varying([flats[id(cell)] for cell in own]) if _is_placement(key)}
            keys = sorted(placed) + [key for key in sorted(common) if _is_option(key, common)]
            several = len({(cell.num_devices, *cell.degrees.items()) for cell in own if cell.degrees}) > len(
                {cell.num_devices for cell in own if cell.degrees}
            )
            for cell in own:
                values = {key: flats[id(cell)].get(key) for key in keys}
                cell.options = ", ".join(
                    _option(key, value) for key, value in values.items() if value != "null"
                )
                if cell.degrees and (several or (mode not in ("none", "fsdp") and len(cell.degrees) > 1)):
                    cell.layout = " x ".join(f"{name}={degree}" for name, degree in cell.degrees.items())
    for attempt in (_asked_degrees, _objective, _device_names, _number):
        count = Counter((cell.setting, cell.label) for cell in cells)
        for index, cell in enumerate(cells):
            if count[cell.setting, cell.label] > 1:
                cell.suffix = " ".join(filter(None, (cell.suffix, attempt(cell, index))))


def _option(key: str, value: str | None) -> str:
    """`attention=sdpa_math`, `interleaved`."""
    if key == "parallelism.block_placement":
        return str(value)
    return f"{key.removesuffix('.name').removeprefix('parallelism.').removeprefix('workload.')}={value}"


def _asked_degrees(cell: Cell, _index: int) -> str:
    """Of a cell that did not get as far as a layout, `ulysses`."""
    asked = describe.mapping(cell.record.requested.get("parallelism"))
    names = [name for name in DEGREES if asked.get(name, 1) not in (1, None)]
    return "" if cell.is_finished else " x ".join(names)


def _objective(cell: Cell, _index: int) -> str:
    return f"objective={cell.record.requested.get('objective')}" if _is_planned(cell.record) else ""


def _device_names(cell: Cell, _index: int) -> str:
    return "+".join(cell.devices)


def _number(_cell: Cell, index: int) -> str:
    return f"#{index}"


def _varying(flats: Sequence[Mapping[str, str]]) -> set[str]:
    """Keys that have not the same value everywhere."""
    keys = {key for flat in flats for key in flat}
    return {key for key in keys if len({flat.get(key) for flat in flats}) > 1}


def _is_placement(key: str) -> bool:
    """Whether a key of `parallelism` is no degree: those that ran are in the cell's layout."""
    return key.startswith("parallelism.") and key.partition(".")[2] not in ("mode", *DEGREES)


def _is_option(key: str, varying: set[str]) -> bool:
    group, _, rest = key.partition(".")
    if group in ("parallelism", "gpus", "objective") or key in [f"{name}.name" for name in IN_TITLE]:
        return False
    return rest in ("", "name") or f"{group}.name" not in varying
