"""The record: written whole or not at all, read back equal, older and foreign files told apart."""

import json
from pathlib import Path

import pytest

from tests.tracking.records import make_record
from wanexp.errors import UserError
from wanexp.record import FILE_NAME, OUTCOMES, SCHEMA_VERSION, read_record


def test_read_back(tmp_path: Path) -> None:
    record = make_record()
    path = record.write(tmp_path)
    assert path == tmp_path / FILE_NAME
    assert read_record(path) == read_record(tmp_path) == record
    assert [entry.name for entry in tmp_path.iterdir()] == [FILE_NAME]


def test_addresses_lose_their_passwords(tmp_path: Path) -> None:
    """In a record that is made, and in one that an older version wrote."""
    words = [
        '+x={uri: "postgresql://bob:s3\'cr@t@host/db"}',
        "x=http\\://bob\\:s3cret@host",
        "y=sqlite:////a@b",
        "a@b",
    ]
    record = make_record(command=["python", *words], overrides=words)
    assert record.requested["tracking"]["uri"] == "http://server:5000"
    assert record.overrides == ['+x={uri: "postgresql://host/db"}', "x=http\\://host", *words[2:]]
    assert record.command == ["python", *record.overrides]
    document = json.loads(record.write(tmp_path).read_text())
    document["command"] = ["tracking.uri=http://bob:s3cret@host"]
    (tmp_path / FILE_NAME).write_text(json.dumps(document))
    assert read_record(tmp_path).command == ["tracking.uri=http://host"]


def test_a_failed_write_leaves_the_old_record(tmp_path: Path) -> None:
    make_record().write(tmp_path)
    with pytest.raises(TypeError):
        make_record(samples={"step_ms": object()}).write(tmp_path)
    assert read_record(tmp_path) == make_record()


def test_what_json_has_no_number_for_is_null(tmp_path: Path) -> None:
    path = make_record(samples={"losses": [1.0, float("nan"), float("inf")]}).write(tmp_path)
    assert json.loads(path.read_text())["samples"]["losses"] == [1.0, None, None]


def test_keys_of_the_schema(tmp_path: Path) -> None:
    document = json.loads(make_record().write(tmp_path).read_text())
    expected = {"schema_version", "outcome", "requested", "effective", "metrics", "samples", "environment"}
    assert expected <= set(document)
    assert {"mode", "layout", "attention", "precision", "device_type", "devices"} <= set(
        document["effective"]
    )


def test_unknown_keys_are_ignored_and_missing_ones_take_defaults(tmp_path: Path) -> None:
    document = {"run_id": "r", "name": "n", "started": "", "requested": {}, "schema_version": 1, "new": 1}
    (tmp_path / FILE_NAME).write_text(json.dumps(document))
    assert read_record(tmp_path).outcome == "failed"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema_version": 99}', '{"schema_version": "1"}'])
def test_a_file_that_is_no_record_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(UserError) as caught:
        read_record(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_record_without_required_keys_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(json.dumps({"schema_version": SCHEMA_VERSION, "run_id": "r"}))
    with pytest.raises(UserError):
        read_record(tmp_path)


def test_no_record(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no record"):
        read_record(tmp_path)


def test_exit_codes() -> None:
    codes = {outcome: make_record(outcome=outcome).exit_code() for outcome in OUTCOMES}
    assert codes == dict.fromkeys(OUTCOMES, 1) | {"finished": 0, "skipped": 0, "interrupted": 130}
