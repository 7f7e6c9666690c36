"""scripts/bench_loading.py: the whole of it on logical CPU devices with real ranks, and its parts."""
# ruff: noqa: E402

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))  # they are no package

import bench_loading

from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.weights import RandomWeights
from wanexp.wan.write_checkpoint import write_checkpoint

SMALL = WanArchitecture(dim=128, ffn_dim=256, num_heads=2, num_layers=3, text_dim=32, freq_dim=16)
CPUS = [torch.device("cpu")] * 2


def sample(seconds, read=100):
    return {"seconds": seconds, "growth_bytes": 2**29, "read_bytes": read, "resident_share": None}


def test_the_script_on_logical_devices(tmp_path):
    out = tmp_path / "loading.md"
    command = [sys.executable, str(ROOT / "scripts" / "bench_loading.py"), "--device=cpu", "--case=tiny"]
    command += ["--layers=1", "--rounds=2", "--shards=2", f"--folder={tmp_path}", f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.with_suffix(".json").read_text())
    names = [bench_loading.BASE, bench_loading.ONE, bench_loading.TWO, bench_loading.RANKS]
    assert [(row["from"], row["what"]) for row in result["rows"]] == [
        (source, name) for source in ("page cache", "disk") for name in names
    ]
    assert [len(row["samples"]) for row in result["rows"]] == [2] * 4 + [1] * 4
    assert result["differing"] == []
    for row in result["rows"]:
        if row["what"] != bench_loading.BASE and row["read_share"] is not None:
            assert 1 <= row["read_share"] < 1.2  # headers, too, weigh something in so small a file
    assert "| page cache | two ranks, a copy each | 2 |" in out.read_text()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []  # what it made is gone


def test_a_checkpoint_that_is_not_there_is_one_line(monkeypatch, capsys, tmp_path):
    arguments = ["bench_loading.py", "--device=cpu", f"--checkpoint={tmp_path / 'x'}", "--out=x.md"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert bench_loading.main() == 2
    assert "error: no checkpoint at" in capsys.readouterr().err


def test_rows_compare_the_turns_of_one_round():
    samples = {
        "load_file": [sample(4.0), sample(6.0)],
        "one GPU": [sample(2.0, 300), sample(2.0)],
        "rest": [],
    }
    base, ours = bench_loading.rows("page cache", samples, num_bytes=100)
    assert base["ratio"] == 1
    assert (ours["ratio"], ours["ratio_low"], ours["ratio_high"]) == (2.5, 2.0, 3.0)
    assert ours["read_share"] == 3
    assert ours["growth_gib"] == 0.5
    assert "| 2 | 2.00 (2.00 to 2.00) | 0.00 | 2.50 (2.00 to 3.00) | 0.50 | 3.000 |" in bench_loading.table(
        [ours]
    )


def test_no_turn_begins_after_the_budget():
    turns = []
    contenders = {name: lambda name=name: turns.append(name) or sample(1.0) for name in "ab"}
    is_over = lambda: len(turns) >= 3  # noqa: E731
    found = bench_loading.take_turns(contenders, 5, is_over=is_over)
    assert (len(found["a"]), len(found["b"])) == (2, 1)
    turns.clear()
    found = bench_loading.take_turns(contenders, 5, is_over=lambda: True, at_least=1, before=lambda: 0.5)
    assert turns == ["a", "b"]
    assert found["a"][0]["resident_share"] == 0.5


def test_other_weights_would_be_noticed(tmp_path, monkeypatch):
    files = write_checkpoint(RandomWeights(SMALL), tmp_path)
    assert bench_loading.compare(tmp_path, files, SMALL, CPUS) == []
    library = bench_loading.library_load

    def wrong(files, device):
        (tensors,) = library(files, device)
        return [tensors | {"head.head.bias": tensors["head.head.bias"] + 1}]

    monkeypatch.setattr(bench_loading, "library_load", wrong)
    assert bench_loading.compare(tmp_path, files, SMALL, CPUS) == ["head.head.bias"] * 2


def test_dropping_says_what_stays(tmp_path):
    files = write_checkpoint(RandomWeights(SMALL), tmp_path)
    if bench_loading.resident_share(files) is None:
        pytest.skip("this kernel does not tell")
    files[0].read_bytes()
    assert bench_loading.resident_share(files) == 1
    assert 0 <= bench_loading.drop_from_cache(files) <= 1
