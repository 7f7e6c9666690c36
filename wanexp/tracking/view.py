"""How MLflow's page of runs opens: columns, the filter of a sweep, and charts.

MLflow shows none of a run's numbers until its reader picks columns. What its "share" button stores, the state
of the page in a tag of the experiment, we can store just as well: a link with the key opens on that state. A link
with a filter of its own loses it, so each sweep has a view that holds its filter.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from wanexp.tracking.location import VIEW_KEY

VIEW_PREFIX = "mlflow.sharedViewState."
VIEW_TAG = VIEW_PREFIX + VIEW_KEY
COLUMNS = {  # in this order -> width in pixels
    "attributes.`Run Name`": 420,
    "runDateAndNestInfo": 130,
    "tags.`outcome`": 90,
    "metrics.`latency/step_ms`": 120,
    "metrics.`throughput/videos_per_hour`": 200,
    "metrics.`memory/peak_allocated_gib`": 210,
    "metrics.`parity/rel_l2`": 110,
    "metrics.`setup/num_devices`": 150,
    "tags.`mode`": 140,
    "tags.`model`": 130,
    "tags.`device`": 180,
    "tags.`sweep_id`": 150,
}


CHARTS = (  # metrics that get a bar chart, in this order
    "latency/step_ms",
    "throughput/videos_per_hour",
    "memory/peak_allocated_gib",
    "energy/wh_per_video",
)
MAX_BARS = 20
SORTED_BY = (
    "metrics.`throughput/videos_per_hour`"  # and not by the step: one of replicas makes several samples
)
IN_TRAINING = {  # which makes no videos: what stands in their place
    "throughput/videos_per_hour": "throughput/samples_per_second",
    "energy/wh_per_video": "energy/joules_per_step",
}


def view_state(query: str | None = None, *, is_training: bool = False) -> str:
    """Value of a shared view's tag: a part of the page's state as JSON; what it leaves out takes MLflow's defaults.

    query: the filter of runs, which are then sorted. is_training: whether they are all of training.
    """

    def shown(name: str) -> str:
        for video, other in IN_TRAINING.items() if is_training else ():
            name = name.replace(video, other)
        return name

    columns = {shown(column): width for column, width in COLUMNS.items()}
    state: dict[str, Any] = {
        "selectedColumns": [column for column in columns if column.startswith(("metrics.", "tags."))],
        "columnOrder": list(columns),
        "columnWidths": columns,
    }
    if query:
        state |= {"searchFilter": query, "orderByKey": shown(SORTED_BY), "orderByAsc": False}
    return json.dumps(state | charts_state(map(shown, CHARTS)))


def charts_state(metrics: Iterable[str]) -> dict[str, Any]:
    """A bar chart of each of `metrics` in the chart view, in one section."""
    section = "wanexp"
    charts = [
        {
            "type": "BAR",
            "uuid": f"wanexp-{place}",
            "metricSectionId": section,
            "metricKey": metric,
            "runsCountToCompare": MAX_BARS,
            "deleted": False,
            "isGenerated": False,
        }
        for place, metric in enumerate(metrics)
    ]
    sections = [
        {"uuid": section, "name": "Key figures", "display": True, "isReordered": False, "deleted": False}
    ]
    return {
        "compareRunCharts": charts,
        "compareRunSections": sections,
        "runsHiddenMode": "FIRST_20_RUNS",
        "isAccordionReordered": True,  # else sections are sorted by name
        "autoRefreshEnabled": False,
    }


def sweep_view_key(sweep_id: str) -> str:
    """Key of the view of one sweep: a tag's name allows fewer characters than a sweep's."""
    return f"{VIEW_KEY}-{hashlib.sha256(sweep_id.encode()).hexdigest()[:12]}"


def sweep_view(sweep_id: str, *, is_training: bool = False) -> tuple[str, str]:
    """Tag and value of the view of one sweep: its runs, on our columns and charts, without its summary run."""
    query = f"tags.sweep_id = {quoted(sweep_id)} AND tags.mode != 'summary'"
    return VIEW_PREFIX + sweep_view_key(sweep_id), view_state(query, is_training=is_training)


def quoted(value: str) -> str:
    """`value` as a string of MLflow's query language, which has no escapes."""
    return '"' + value.replace('"', "") + '"'
