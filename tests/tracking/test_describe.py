"""Names, tags, params, metrics, series and the description of records: finished, crashed, nearly empty."""

import math

import pytest

from tests.tracking.records import make_record
from wanexp.record import OUTCOMES, Record
from wanexp.tracking import describe
from wanexp.tracking.markdown import description


def empty_record(**changes: object) -> Record:
    return Record(**({"run_id": "r", "name": "n", "started": "", "requested": {}} | changes))  # type: ignore[arg-type]


def on_cpu() -> Record:
    record = make_record()
    devices = [{"type": "cpu", "index": i, "name": "EPYC"} for i in (0, 1)]
    record.effective |= {"device_type": "cpu", "devices": devices}
    return record


def test_run_name_is_the_verdict() -> None:
    assert describe.run_name(make_record()) == "block_distribution 2 GPUs - 812 ms/step - 7.1 GiB - tiny"
    variant = make_record(overrides=["parallelism=block_distribution_interleaved"])
    assert describe.run_name(variant).startswith("block_distribution_interleaved 2 GPUs - 812 ms/step")
    told = make_record(
        overrides=["parallelism=none", "gpus=[0,1]", "precision=fp8", "video.num_frames=33", "seed=1"]
    )
    assert describe.run_name(told).endswith(" - 7.1 GiB - tiny - precision=fp8 video.num_frames=33")
    auto = make_record(overrides=["parallelism=auto"])
    assert describe.run_name(auto).startswith("block_distribution 2 GPUs -")
    assert describe.run_name(on_cpu()).startswith("block_distribution 2 CPU - 812 ms/step")
    out_of_memory = make_record(outcome="oom", metrics={})
    assert describe.run_name(out_of_memory) == "block_distribution 2 GPUs - oom - tiny"
    inexact = make_record(outcome="inexact")
    assert describe.run_name(inexact) == "block_distribution 2 GPUs - inexact - 812 ms/step - 7.1 GiB - tiny"
    skipped = make_record(outcome="skipped", effective={}, metrics={})
    assert describe.run_name(skipped) == "block_distribution 2 GPUs - skipped - tiny"
    skipped.requested["gpus"] = [0]
    assert describe.run_name(skipped) == "block_distribution 1 GPU - skipped - tiny"
    skipped.requested["hardware"]["device_type"] = "cpu"
    assert describe.run_name(skipped) == "block_distribution 1 CPU - skipped - tiny"


@pytest.mark.parametrize(
    ("value", "text"),
    [(8.1234, "8.12 ms"), (99.96, "100 ms"), (812.4, "812 ms"), (9999, "9999 ms"), (12345, "12.3 s")],
)
def test_milliseconds(value: float, text: str) -> None:
    assert describe.milliseconds(value) == text


def test_numbers_have_no_exponent() -> None:
    values = (0.0, 0.000123, 8.1, 99.96, 812.4, 18263.0, -0.5)
    texts = ["0", "0.000123", "8.10", "99.96", "812.4", "18,263", "-0.5000"]
    assert [
        describe.number(value, digits) for value, digits in zip(values, (3, 3, 3, 4, 4, 3, 4), strict=True)
    ] == texts


def test_loading_that_read_nothing_has_no_rate() -> None:
    metrics = {"load/seconds": 1.7, "load/gib_per_second": 15.6, "load/read_gib": 26.6}
    assert describe.loading(metrics) == "1.70 s, 15.6 GiB/s"
    assert describe.loading(metrics | {"load/read_gib": 0.0}) == "weights made in 1.70 s"
    assert describe.loading({}) is None


def test_gibibytes() -> None:
    assert describe.gibibytes(7.12) == "7.1 GiB"
    assert describe.gibibytes(0.0123) == "12.6 MiB"


def test_tags() -> None:
    tags = describe.tags_of(make_record(sweep_id="modes"))
    assert tags["outcome"] == "finished"
    assert tags["num_gpus"] == tags["num_devices"] == "2"
    assert tags["weights"] == "random"
    assert tags["warnings"] == "1"
    assert tags["sweep_id"] == "modes"
    assert tags["mlflow.source.git.commit"] == "c1e0063"
    assert describe.tags_of(on_cpu())["num_gpus"] == "0"
    record = on_cpu()
    record.metrics["setup/num_gpus"] = 2.0  # MLflow never contradicts the record
    assert describe.tags_of(record)["num_gpus"] == "2"
    assert describe.metrics_of(record)["setup/num_gpus"] == 2


def test_params_are_flat_cut_and_without_password() -> None:
    record = make_record()
    record.requested["checkpoint"] = "x" * 9000
    params = describe.params_of(record)
    assert params["model.architecture.dim"] == "512"
    assert params["parallelism.block_split"] == "[4, 4]"
    assert params["workload.batch_size"] == "null"
    assert params["effective.layout.blocks"] == "2"
    assert len(params["checkpoint"]) == describe.MAX_PARAM
    assert params["tracking.uri"] == "http://server:5000"


def test_metrics_are_finite_and_have_clean_names() -> None:
    metrics = {
        "a[0]/b": 1.0,
        "inf": math.inf,
        "nan": math.nan,
        "../up": 2.0,
        "x" * 300: 3.0,
        "flag": True,
        "": 4.0,
    }
    found = describe.metrics_of(make_record(metrics=metrics))
    assert {key: value for key, value in found.items() if not key.startswith("setup/")} == {
        "a_0_/b": 1.0,
        "up": 2.0,
        "x" * 250: 3.0,
        "_": 4.0,
    }
    assert found["setup/num_gpus"] == 2
    assert found["setup/tokens"] == 3 * 4 * 8


def test_energy_of_a_video() -> None:
    """A step of two replicas makes two samples, so a video costs half of 50 such steps."""
    record = make_record()
    record.metrics["energy/joules_per_step"] = 7200.0
    assert "energy/wh_per_video" not in describe.metrics_of(record)  # of a model that does not tell its steps
    record.requested["model"]["sampling_steps"] = 50
    record.effective["batch_size"] = 2
    assert describe.metrics_of(record)["energy/wh_per_video"] == pytest.approx(50.0)
    assert "| Energy | 50.0 Wh/video |" in description(record, rerun="x")
    record.requested["workload"]["name"] = "train"
    assert "energy/wh_per_video" not in describe.metrics_of(record)
    assert "| Energy of a step | 7,200 J |" in description(record, rerun="x")


def test_points_are_series() -> None:
    points = list(describe.points_of(make_record()))
    steps = [point for point in points if point.key == "steps/step_ms"]
    assert [point.value for point in steps] == [810.0, 812.4, 815.1, 811.0]
    assert [point.step for point in steps] == [0, 1, 2, 3]
    assert [p.value for p in points if p.key == "steps/ranks/0/forward_ms"] == [405.0, 406.0]
    power = [point for point in points if point.key == "system/gpu0/power_w"]
    assert power[4].timestamp - power[0].timestamp == 1000
    assert power[0].timestamp == describe.start_ms(make_record())


@pytest.mark.parametrize(("outcome", "last_s"), [("finished", 4.0), ("inexact", 4.0), ("oom", 4.75)])
def test_telemetry_ends_with_the_timed_steps(outcome: str, last_s: float) -> None:
    """Of a run that did not get through them, all of it: its end is what one wants to see."""
    record = make_record(outcome=outcome)
    record.samples |= {"phase_s": {"set-up": 0.1, "measure": 1.0}, "step_ms": [1500.0, 1600.0]}
    power = [point for point in describe.points_of(record) if point.key == "system/gpu0/power_w"]
    assert power[-1].timestamp - power[0].timestamp == 1000 * last_s


def test_telemetry_is_thinned_and_keeps_its_ends() -> None:
    series = [[0.25 * i, float(i)] for i in range(20_000)]
    points = [
        p for p in describe.points_of(make_record(telemetry={"gpu0/x": series})) if p.key == "system/gpu0/x"
    ]
    assert len(points) == describe.MAX_SERIES_POINTS
    assert (points[0].value, points[-1].value) == (0, 19_999)


def test_description_of_a_finished_run() -> None:
    text = description(make_record(), rerun="scripts/rerun.py a/record.json")
    first = (
        "**block_distribution on 2 x NVIDIA H200: finished, 812 ms a step, 7.1 GiB on the fullest device**"
    )
    assert text.startswith(first)
    assert "| gpu1 | NVIDIA H200 | 6.9 GiB | 3.4 GiB |  |" in text
    assert "| rank0 |  |  |  | 2.1 GiB |" in text
    assert "| Answer against mode none | bit-equal |" in text
    assert "scripts/rerun.py a/record.json" in text
    assert "the clocks \\| were throttled" in text
    assert "python -m wanexp parallelism=block_distribution 'gpus=[0,1]'" in text
    assert "No GPU" not in text


def test_description_says_over_how_many_blocks_the_answer_was_compared() -> None:
    record = make_record()
    record.requested["model"]["architecture"]["num_layers"] = 40
    for error, compared, said in (
        (0.0, 4.0, "bit-equal, 4 of 40 blocks"),
        (0.003, 4.0, "relative L2 0.003, 4 of 40 blocks"),
        (0.003, 40.0, "relative L2 0.003"),
    ):
        record.metrics |= {"parity/rel_l2": error, "parity/num_blocks": compared}
        assert f"| Answer against mode none | {said} |" in description(record, rerun="x")


def test_description_says_that_there_was_no_gpu() -> None:
    text = description(on_cpu(), rerun="x")
    assert "on 2 logical CPU devices (no GPU)" in text
    assert "No GPU was used" in text


def test_description_of_a_crash_fits_the_limit() -> None:
    record = make_record(
        outcome="failed",
        message="m" * 5000,
        error={"rank": 1, "type": "RuntimeError", "traceback": "line\n" * 50 + "x" * 9000},
        warnings=["w" * 100] * 100,
        metrics={f"memory/gpu{i}/peak_allocated_gib": 1.0 for i in range(200)},
    )
    text = description(record, rerun="scripts/rerun.py a/record.json")
    assert len(text) <= describe.MAX_TAG
    assert "scripts/rerun.py a/record.json" in text


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_a_record_with_nothing_in_it(outcome: str) -> None:
    record = empty_record(outcome=outcome, started="not a time")
    assert describe.run_name(record)
    assert describe.tags_of(record)["outcome"] == outcome
    assert describe.params_of(record) == {}
    assert list(describe.points_of(record)) == []
    assert describe.end_ms(record) == 0
    assert description(record, rerun="x")


def test_times_without_zone_are_utc() -> None:
    assert describe.start_ms(empty_record(started="1970-01-01T00:00:01")) == 1000
    backwards = empty_record(started="1970-01-01T00:00:09Z", ended="1970-01-01T00:00:01Z")
    assert describe.end_ms(backwards) == 9000
