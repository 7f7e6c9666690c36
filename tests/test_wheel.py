"""The installed wheel: it brings its conf along, works from any folder, and takes a user's own config folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked as pip would; what it needs comes from the environment of the tests."""
    build = pytest.importorskip("hatchling.builders.wheel")
    folder = tmp_path_factory.mktemp("wheel")
    wheel = next(build.WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"]))
    site = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def run(site: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "wanexp", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)


def test_wheel_holds_package_and_configs_and_nothing_else(site: Path) -> None:
    top = {path.name for path in site.iterdir()}
    assert top == {"wanexp", "wanexp-0.1.0.dist-info"}
    shipped = {
        path.relative_to(site / "wanexp" / "conf") for path in (site / "wanexp" / "conf").rglob("*.yaml")
    }
    assert shipped == {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")}


def test_wheel_runs_elsewhere_with_a_users_own_model(site: Path, tmp_path: Path) -> None:
    own = tmp_path / "my_conf" / "model"
    own.mkdir(parents=True)
    architecture = (
        "{dim: 64, ffn_dim: 128, num_heads: 2, num_layers: 2, text_dim: 16, text_len: 8, freq_dim: 32}"
    )
    (own / "mine.yaml").write_text(f"name: mine\narchitecture: {architecture}\n")
    done = run(site, tmp_path, "--config-dir", "my_conf", "model=mine", "tracking=none", "precision=fp32")
    assert done.returncode == 0, done.stderr
    assert "mine" in done.stdout and "finished" in done.stdout
    assert len(list((tmp_path / "multirun" / "runs").glob("*/record.json"))) == 1
