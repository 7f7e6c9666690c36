"""A run as rows of MLflow's database, in one transaction: how many runs are imported.

MLflow's own calls make ten commits a run and an object of its ORM for each point, 50 ms where the rows take 5. A run
that is written here is there as a whole or not at all. MLflow promises no table: a test holds the rows of both ways
together, and where a table has other columns than these, `can_write` says no and the calls are used, as for servers.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wanexp.tracking.describe import Point

if TYPE_CHECKING:
    from sqlalchemy import Engine

COLUMNS = {
    "runs": (
        "run_uuid name experiment_id artifact_uri status lifecycle_stage user_id source_type source_name"
        " entry_point_name source_version start_time end_time deleted_time"
    ),
    "tags": "run_uuid key value",
    "params": "run_uuid key value",
    "metrics": "run_uuid key value timestamp step is_nan",
    "latest_metrics": "run_uuid key value timestamp step is_nan",
}


@dataclass(frozen=True)
class RunRows:
    """What a run holds. artifact_uri: of its files, which are written first."""

    run_id: str
    experiment_id: str
    artifact_uri: str
    name: str
    status: str
    start_ms: int
    end_ms: int
    tags: Mapping[str, str]
    params: Mapping[str, str]
    points: Iterable[Point]


@functools.cache
def can_write(uri: str) -> bool:
    """Whether `uri` is a database whose tables are the ones that are known here. It must have been made."""
    if uri.partition("+")[0].partition(":")[0] not in ("sqlite", "postgresql", "mysql"):
        return False
    import sqlalchemy

    inspector = sqlalchemy.inspect(_engine(uri))
    return all(
        inspector.has_table(table)
        and {column["name"] for column in inspector.get_columns(table)} == set(columns.split())
        for table, columns in COLUMNS.items()
    )


def has_tag(uri: str, key: str, value: str) -> bool:
    """Whether any run has this tag."""
    import sqlalchemy

    tags = sqlalchemy.table("tags", *map(sqlalchemy.column, COLUMNS["tags"].split()))
    with _engine(uri).connect() as connection:
        query = sqlalchemy.select(tags.c.run_uuid).where(tags.c.key == key, tags.c.value == value).limit(1)
        return connection.execute(query).first() is not None


def write_run(uri: str, rows: RunRows) -> None:
    """All rows of a run, or none of them."""
    import sqlalchemy

    points = {(point.key, point.timestamp, point.step, point.value): point for point in rows.points}
    latest: dict[str, Point] = {}
    for point in points.values():
        last = latest.get(point.key)
        if last is None or _age(point) > _age(last):
            latest[point.key] = point
    content: dict[str, list[dict[str, Any]]] = {
        "runs": [
            {
                "name": rows.name,
                "experiment_id": int(rows.experiment_id),
                "artifact_uri": rows.artifact_uri,
                "status": rows.status,
                "lifecycle_stage": "active",
                "user_id": "unknown",
                "source_type": "UNKNOWN",
                "source_name": "",
                "entry_point_name": "",
                "source_version": "",
                "start_time": rows.start_ms,
                "end_time": rows.end_ms,
                "deleted_time": None,
            }
        ],
        "tags": _pairs({**rows.tags, "mlflow.runName": rows.name}),
        "params": _pairs(rows.params),
        "metrics": [_metric(point) for point in points.values()],
        "latest_metrics": [_metric(point) for point in latest.values()],
    }
    with _engine(uri).begin() as connection:
        for table, of_table in content.items():
            if of_table:
                names = COLUMNS[table].split()
                target = sqlalchemy.table(table, *map(sqlalchemy.column, names))
                connection.execute(target.insert(), [{"run_uuid": rows.run_id, **row} for row in of_table])


def _age(point: Point) -> tuple[int, int, float]:
    return point.step, point.timestamp, point.value


def _metric(point: Point) -> dict[str, Any]:
    moment = {"timestamp": point.timestamp, "step": point.step}
    return {"key": point.key, "value": point.value, **moment, "is_nan": False}


def _pairs(values: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"key": key, "value": value} for key, value in values.items()]


@functools.cache
def _engine(uri: str) -> "Engine":
    import sqlalchemy

    return sqlalchemy.create_engine(
        uri, poolclass=sqlalchemy.pool.NullPool
    )  # nothing stays open between runs
