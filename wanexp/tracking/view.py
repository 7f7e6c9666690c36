"""The columns with which MLflow's table of runs opens.

MLflow shows none of a run's numbers until its reader picks columns. What its "share" button stores, the state
of the page in a tag of the experiment, we can store just as well: a link with the key opens on these columns.
"""

import json

VIEW_KEY = "wanexp"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW_KEY}"
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


def view_state() -> str:
    """Value of VIEW_TAG: a part of the page's state as JSON; what it leaves out takes MLflow's defaults."""
    selected = [column for column in COLUMNS if column.startswith(("metrics.", "tags."))]
    return json.dumps({"selectedColumns": selected, "columnOrder": list(COLUMNS), "columnWidths": COLUMNS})
