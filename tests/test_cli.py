"""The command line: help, composing, the line of each user error, exit codes. The runner is replaced here."""

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from wanexp import __main__ as program
from wanexp import __version__
from wanexp.config import RunConfig, to_dict
from wanexp.errors import LayoutError, UserError
from wanexp.record import Record

ROOT = Path(__file__).resolve().parents[1]


class FakeRunner(ModuleType):
    """In the place of wanexp.runner: notes what it is called with, and ends as told."""

    def __init__(self) -> None:
        super().__init__("wanexp.runner")
        self.calls: list[dict] = []
        self.ending: str | BaseException = "finished"

    def run(self, config, *, folder, overrides, sweep=None):
        self.calls.append({"config": config, "folder": folder, "overrides": overrides, "sweep": sweep})
        if isinstance(self.ending, BaseException):
            raise self.ending
        message = "" if self.ending == "finished" else "gpu0 is full"
        return Record(
            "id", "name", "now", to_dict(config), overrides=overrides, outcome=self.ending, message=message
        )


@pytest.fixture
def runner(monkeypatch, tmp_path):
    fake = FakeRunner()
    monkeypatch.setitem(sys.modules, "wanexp.runner", fake)
    monkeypatch.chdir(tmp_path)
    for name in ("HYDRA_FULL_ERROR", "RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return fake


@pytest.fixture
def cli(runner, monkeypatch, capsys):
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["wanexp", *arguments])
        try:
            code = program.main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_a_run_gets_its_config_folder_and_overrides(cli, runner, tmp_path):
    code, out, err = cli("parallelism=block_distribution", "gpus=[0,1,2,3]")
    assert (code, out, err) == (0, "", "")
    (call,) = runner.calls
    assert call["config"].parallelism.mode == "block_distribution"
    assert call["config"].gpus == [0, 1, 2, 3]
    assert call["overrides"] == ["parallelism=block_distribution", "gpus=[0,1,2,3]"]
    assert call["sweep"] is None
    folder = call["folder"]
    assert folder.parent == tmp_path / "multirun" / "runs"
    assert folder.name.endswith("_block_distribution")
    assert sorted(path.name for path in folder.iterdir()) == [".hydra"]
    assert sorted(path.name for path in (folder / ".hydra").iterdir()) == [
        "config.yaml",
        "hydra.yaml",
        "overrides.yaml",
    ]


@pytest.mark.parametrize(
    ("outcome", "code"),
    [("finished", 0), ("skipped", 0), ("interrupted", 130), ("oom", 1), ("inexact", 1), ("failed", 1)],
)
def test_exit_codes_follow_the_outcome(cli, runner, outcome, code):
    runner.ending = outcome
    assert cli()[0] == code


def test_a_user_error_of_the_run_is_one_line(cli, runner, tmp_path):
    runner.ending = LayoutError("mode none uses one device")
    assert cli("gpus=[0,1]") == (2, "", "error: mode none uses one device\n")
    assert list((tmp_path / "multirun" / "runs").iterdir()) == [], "leaves no folder behind"


def test_ctrl_c_outside_of_a_run(cli, runner):
    runner.ending = KeyboardInterrupt()
    assert cli() == (130, "", "interrupted\n")


def test_sigterm_ends_a_background_job_whose_ctrl_c_is_ignored(cli):
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as after `wanexp &` in a script
        cli("--version")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def test_a_run_whose_output_finds_no_space_ends_in_one_line(cli, runner):
    runner.ending = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert cli() == (1, "", "error: cannot write the output: No space left on device\n")


def test_a_mistake_of_ours_keeps_its_traceback(cli, runner):
    runner.ending = ValueError("ours")
    with pytest.raises(ValueError, match="ours"):
        cli()


GROUP_MODES = "write one of: auto, block_distribution, block_distribution_interleaved, cfg_parallel, "
ERRORS = [
    (
        ["parallelism=block_distrib"],
        "parallelism 'block_distrib' does not exist (did you mean block_distribution?)",
    ),
    (["parallelism=block_distrib"], GROUP_MODES),
    (
        ["model=wan2.1_t2v_1.3B"],
        "model 'wan2.1_t2v_1.3B' does not exist (did you mean wan2.1_t2v_1.3b?); write one of",
    ),
    (["--foo"], "unrecognized arguments: --foo; --help lists the options"),
    (["--cfg", "jobs"], "argument --cfg/-c: invalid choice: 'jobs'"),
    (["hardware=h100"], "hardware 'h100' does not exist"),
    (
        ["hardware/device=h1000", "hardware=2x_h100"],
        "hardware/device 'h1000' does not exist (did you mean h100?)",
    ),
    (
        ["workload.num_step=3"],
        "workload.num_step does not exist (did you mean num_steps?); keys of workload: name, num_",
    ),
    (["gpu=[0]"], "gpu does not exist (did you mean gpus?); keys: model, hardware, parallelism"),
    (["+gpu=[0]"], "gpu does not exist (did you mean gpus?)"),
    (["modl=tiny"], "modl does not exist (did you mean model?)"),
    (["seed.x=3"], "seed.x does not exist; seed is a single value"),
    (["workload.num_steps=abc"], "workload.num_steps is 'abc'; write a whole number"),
    (["workload.num_steps=2.5"], "workload.num_steps is '2.5'; write a whole number"),
    (["limits.run_s=soon"], "limits.run_s is 'soon'; write a number"),
    (["profile=maybe"], "profile is 'maybe'; write true or false"),
    (["gpus=0"], "gpus is '0'; write a list such as [0,1] or null"),
    (["workload.guidance_scale=4"], "workload.guidance_scale is '4'; write a list such as [5.0] or null"),
    (["checkpoint="], "checkpoint is empty; write a path, or checkpoint=null"),
    (["checkpoint=[1]"], "checkpoint is '[1]'; write a word or null"),
    (
        ["+experiment=quick_block"],
        "experiment 'quick_block' does not exist (did you mean quick_blocks?); write one of",
    ),
    (
        ["+sweep=mode"],
        "sweep 'mode' does not exist (did you mean modes?); write one of: attention, batch_size, guide",
    ),
    (
        ["experiment=quick_blocks"],
        "experiment is not in the defaults; choose it with a plus: +experiment=quick_blocks",
    ),
    (["+model=tiny"], "model is chosen already; write model=NAME without the plus"),
    (
        ["hardware=2x_h200", "+hardware/device=h100"],
        "hardware/device is chosen already; write hardware/device=h100 without the plus",
    ),
    (["+seed=3"], "seed exists already; write seed=VALUE without the plus"),
    (["model=tiny,wan2.1_t2v_14b"], "names several values; add -m to sweep over them"),
    (["gpus=[0"], "gpus=[0 cannot be read"),
    (
        ["checkpoint=/tmp/my models (x)/a.safetensors"],
        "write it with quotes inside: \"checkpoint='/tmp/my models (x)/a.safetensors'\"",
    ),
    (
        ["-m", "workload.num_steps=interval(1,3)"],
        "workload.num_steps=interval(1,3) does not say which values; write a list such as 1,2,3 or range(1,4)",
    ),
    (["verify"], "'verify' is not of the form key=value; write verify=VALUE"),
    (["model=null"], "model 'null' does not exist; write one of: tiny, wan2.1_flf2v_14b"),
    (["workload=5"], "workload '5' does not exist; write one of: denoise, train"),
    (["-m", "model=null,tiny"], "a config group is set to something else than a name"),
    (["gpus={a:1}"], "gpus is '{a:1}'; write a list such as [0,1] or null"),
    (["model.guidance_scale={a:1}"], "model.guidance_scale is '{a:1}'; write a list such as [5.0]"),
    (["parallelism.block_split=4"], "parallelism.block_split is '4'; write a list such as [4,4] or null"),
    (["limits=5"], "limits is '5' and holds several keys; write limits.run_s=VALUE (keys: run_s, stall_s)"),
    (["limits=null"], "limits is 'null' and holds several keys; write limits.run_s=VALUE"),
    (["~parallelism"], "error: parallelism.mode has no value; write parallelism=NAME"),
    (["gpus=0,1"], "add -m to sweep over them, or write a list: 'gpus=[0,1]'"),
    (["gpus=[0,1],[0,1,2,3]"], "names several values; add -m to sweep over them, or write one of them\n"),
    (["seed=range(1,3)"], "names several values; add -m to sweep over them, or write one of them\n"),
    (["task=plan", "seed=1,2"], "seed=1,2 names several values, and task=plan prints one plan; write one of"),
    (
        ["-m", "sweep_name=a,b"],
        "sweep_name has several values (of several +sweep, too); a sweep has one folder: write one +sweep, or",
    ),
    (["hardware.device.memory_gib=24"], "hardware.device is null here; write +hardware/device=NAME first"),
    (["--config-dir=nowhere"], "nowhere' not found"),
    (["--config-name=other"], "Cannot find primary config 'other'"),
    (["tracking.uri=foo"], "tracking.uri is 'foo'; write sqlite:///mlflow.db or http://127.0.0.1:5000"),
    (["seed=-1"], "seed is -1; write 0 or more"),
    (["checkpoint=${oc.env:NOT_SET_ANYWHERE}"], "Environment variable 'NOT_SET_ANYWHERE' not found"),
    (["-m", "model=tny,tiny"], "model 'tny' does not exist (did you mean tiny?)"),
    (["-m", "sed=1,2"], "sed does not exist (did you mean seed?)"),
    (["-m", "seed=-1,-2"], "seed is -1; write 0 or more (other cells: other errors)"),
    (["-m", "video.num_frames=10", "seed=1,2"], "video.num_frames is 10"),
    (["-m", "gpus=[9]", "hardware=cpu", "seed=1,2"], "there is no device 9"),
    (["+sweep=modes", "hardware=cpu", "checkpoint=/nope"], "no checkpoint at /nope"),
    (["+sweep=modes", "hardware=cpu", "gpus=[0]", "checkpoint=/nope"], "no checkpoint at /nope"),
    (["+sweep=modes", "task=plan"], "prints one plan and runs nothing; leave out -m and +sweep"),
    (["-m", "seed=1,2", "sweep_name=runs"], "sweep_name is 'runs', the folder of single runs"),
]


@pytest.mark.parametrize(("arguments", "part"), ERRORS)
def test_a_user_error_is_one_line_on_stderr_and_code_2(cli, runner, arguments, part, tmp_path):
    code, out, err = cli(*arguments)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert part in err
    assert not runner.calls
    assert not [path for path in (tmp_path / "multirun").rglob("*") if path.is_file()], (
        "leaves no file behind"
    )


@pytest.mark.parametrize("arguments", [["task=plan"], ["seed=-1"]])
@pytest.mark.parametrize("folder", [".", "out", "made"])
def test_what_is_no_run_removes_no_folder_but_its_own(cli, tmp_path, arguments, folder):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    cli("hardware=cpu", *arguments, f"hydra.run.dir={folder}")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "out",
        "out/mine",
    ]


@pytest.mark.parametrize("subdir", ["mine", "."])
def test_what_is_no_run_removes_no_file_but_hydras(cli, tmp_path, subdir):
    (tmp_path / "mine").mkdir()
    for kept in ("mine/file", "file"):
        (tmp_path / kept).touch()
    cli("hardware=cpu", "task=plan", "hydra.run.dir=.", f"hydra.output_subdir={subdir}")
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert left == ["file", "mine", "mine/file"]


def test_an_empty_working_folder_outlives_what_is_no_run(cli, tmp_path):
    cli("hardware=cpu", "task=plan", "hydra.run.dir=.")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["/proc/x", "file", "file/x", "x" * 300])
@pytest.mark.parametrize("arguments", [["hydra.run.dir="], ["-m", "seed=1,2", "hydra.sweep.dir="]])
def test_a_folder_that_cannot_be_written_is_one_line(cli, runner, tmp_path, folder, arguments):
    (tmp_path / "file").touch()
    code, out, err = cli(*arguments[:-1], arguments[-1] + folder)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("error: cannot write ") and f"{folder}: " in err
    assert err.endswith(f"; run where you may write, or set {arguments[-1]}FOLDER\n")
    assert not runner.calls


@pytest.mark.parametrize(
    ("number", "name", "code", "line"),
    [
        (
            errno.EACCES,
            "/x",
            2,
            "cannot write /x: Permission denied; run where you may write, or set hydra.run",
        ),
        (errno.EROFS, "/x", 2, "cannot write /x: Read-only file system; run where you may write"),
        (errno.ENOSPC, "/x", 1, "cannot write /x: No space left on device\n"),
        (errno.ENOSPC, None, 1, "cannot write the output: No space left on device\n"),
        (errno.EACCES, __file__, 2, f"cannot read {__file__}: Permission denied; make it readable\n"),
    ],
)
def test_what_the_system_refuses_is_one_line(cli, monkeypatch, number, name, code, line):
    def refuse() -> None:
        raise OSError(number, os.strerror(number), name)

    monkeypatch.setattr(program, "_run_hydra", refuse)
    monkeypatch.setattr(program.os, "access", lambda _path, mode: mode == os.F_OK)
    found, _, err = cli()
    assert found == code and err.startswith(f"error: {line}") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("ending", "code", "line"),
    [
        ("finished", 0, ""),
        ("oom", 1, "error: seed=3: oom: gpu0 is full\n"),
        (UserError("there is no device 9"), 2, "error: there is no device 9\n"),
    ],
)
def test_a_run_in_a_process_of_another_launcher_raises_what_went_wrong(
    cli, runner, monkeypatch, ending, code, line
):
    """It could hand back nothing else: Slurm's pickles the job, and the lists that it closes over."""
    runner.ending = ending
    pids = iter([1])  # of main(); then another's
    monkeypatch.setattr(program.os, "getpid", lambda: next(pids, 2))
    found, _, err = cli("seed=3")
    assert found == code
    assert err.splitlines()[1:] == line.splitlines(), "after Hydra's own"


@pytest.mark.skipif(find_spec("submitit") is not None, reason="it is installed")
@pytest.mark.parametrize("name", ["slurm", "submitit_slurm"])
def test_slurm_without_its_package_says_what_to_install(cli, name):
    code, _, err = cli("-m", f"hydra/launcher={name}", "seed=1,2")
    wanted = "error: hydra/launcher=slurm needs hydra-submitit-launcher; write pip install 'wanexp[slurm]'\n"
    assert (code, err) == (2, wanted)


def test_a_user_who_wants_the_traceback_gets_it(cli, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(Exception, match="block_distrib"):
        cli("parallelism=block_distrib")
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


def test_the_environment_is_left_as_it_was(cli):
    cli("nonsense=1")
    assert "HYDRA_FULL_ERROR" not in os.environ


@pytest.fixture
def user_folder(tmp_path):
    (tmp_path / "mine" / "model").mkdir(parents=True)
    return tmp_path / "mine"


MY_MODEL = (
    "defaults: [tiny, override /video@_global_.video: 480p]\nname: mine\narchitecture: {num_layers: 2}\n"
)


def test_a_folder_of_the_users_own_joins(cli, runner, user_folder):
    (user_folder / "model" / "mine.yaml").write_text(MY_MODEL)
    assert cli("--config-dir", str(user_folder), "model=mine")[0] == 0
    config = runner.calls[0]["config"]
    assert (config.model.name, config.model.architecture.num_layers) == ("mine", 2)
    assert (config.model.architecture.text_dim, config.video.name) == (128, "480p")
    assert cli(f"hydra.searchpath=[file://{user_folder}]", "model=mine", "video=tiny")[0] == 0
    assert runner.calls[1]["config"].video.name == "tiny"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (
            "name: mine\ndimm: 3\n",
            "in model/mine: model.dimm does not exist; keys of model: name, architecture",
        ),
        ("name: mine\nshift: high\n", "in model/mine: model.shift: Value 'high'"),
        ("name: [mine\n", "mine.yaml, line 2 is not valid YAML"),
        ("defaults: [override /video@_global_.video: 4k]\n", "video '4k' does not exist"),
        ("defaults: [base]\n", "In 'model/mine': Could not load 'model/base'"),
    ],
)
def test_an_error_in_a_users_file_is_one_line(cli, user_folder, text, part):
    (user_folder / "model" / "mine.yaml").write_text(text)
    code, _, err = cli("--config-dir", str(user_folder), "model=mine")
    assert code == 2 and err.count("\n") == 1
    assert part in err


def test_help_has_examples_and_the_groups(cli):
    code, out, err = cli("--help")
    assert (code, err) == (0, "")
    for text in (
        "python -m wanexp parallelism=block_distribution 'gpus=[0,1,2,3]'",
        "+sweep=modes",
        "parallelism: auto, block_distribution, ",
        "model: tiny, wan2.1_flf2v_14b",
        "experiment: four_rtx3080_14b, mlperf_t2v_a14b",
        "Exit code",
    ):
        assert text in out
    assert "powered by hydra" not in out.lower()


def test_help_names_every_single_key_and_the_config_gives_it_with_a_comment(cli):
    """A key that somebody adds to the schema is found by who looks for it."""
    _, out, _ = cli("--help")
    lines = (ROOT / "conf" / "config.yaml").read_text().splitlines()
    commented = {line.partition(":")[0] for line in lines if ": " in line and "  # " in line}
    keys = {item.name for item in fields(RunConfig)}
    single = keys - {path.name for path in (ROOT / "conf").iterdir()} - {"limits"}
    assert {"task", "force", "gpus"} <= single <= commented
    assert not {key for key in keys if not re.search(rf"\b{key}\b", out)}


def test_version_is_that_of_wanexp_and_of_torch(cli):
    code, out, err = cli("seed=1", "--version")
    assert (code, err) == (0, "")
    assert out.startswith(f"wanexp {__version__}, torch {version('torch')}")


def test_help_examples_compose(cli, runner):
    """Every example of the help text does what it says."""
    _, out, _ = cli("--help")
    lines = [line.strip() for line in out.splitlines() if line.strip().startswith("python -m wanexp")]
    assert len(lines) >= 8
    for line in lines:
        words = shlex.split(line.split("   ")[0])[3:]
        if {"-m", "+sweep=modes", "--config-dir"} & set(words):
            continue  # sweeps: test_sweep.py; user folders: above
        assert cli(*words)[0] == 0, line


def test_cfg_prints_the_composed_config(cli, runner):
    code, out, err = cli("--cfg", "job", "model=wan2.1_t2v_14b")
    assert (code, err, runner.calls) == (0, "", [])
    assert "name: wan2.1_t2v_14b" in out and "width: 832" in out


def test_other_ranks_of_an_outer_torchrun_leave_no_folder(cli, runner, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert cli("gpus=[0,1]")[0] == 0
    owner, other = (call["folder"] for call in runner.calls)
    assert owner.parent == tmp_path / "multirun" / "runs"
    assert tmp_path not in other.parents and not other.exists()
    assert len(list((tmp_path / "multirun" / "runs").iterdir())) == 1
    assert runner.calls[1]["overrides"] == ["gpus=[0,1]"]


@pytest.mark.parametrize("arguments", [["-m", "seed=1,2"], ["+sweep=modes"]])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_sweep_under_torchrun_is_refused(cli, runner, monkeypatch, arguments, rank, tmp_path):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    code, _, err = cli(*arguments)
    assert code == 2 and "without torchrun" in err and err.count("\n") == 1
    assert not runner.calls and not (tmp_path / "multirun").exists()


LIGHT = """
import json, sys
import wanexp.__main__, wanexp.config, wanexp.sweep, wanexp.compose_errors, wanexp.record
sys.argv = ["wanexp", "--cfg", "job"]
wanexp.__main__.main()
print("LOADED", json.dumps(sorted(sys.modules)))
"""


def test_composing_imports_nothing_slow():
    result = subprocess.run(
        [sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(result.stdout.split("LOADED ")[1]))
    assert not loaded & {
        "torch",
        "mlflow",
        "rich",
        "numpy",
        "pandas",
        "psutil",
        "matplotlib",
        "wanexp.runner",
    }


def test_the_module_runs_as_a_program(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-m", "wanexp", "gpu=[0]"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: gpu does not exist") and result.stderr.count("\n") == 1


def test_options_may_follow_overrides():
    from wanexp.__main__ import options_first

    assert options_first(["a=1", "-m", "b=1,2"]) == ["-m", "a=1", "b=1,2"]
    assert options_first(["a=1", "--config-dir", "mine", "--cfg", "job"]) == [
        "--config-dir",
        "mine",
        "--cfg",
        "job",
        "a=1",
    ]
    assert options_first(["a=1", "--config-dir"]) == ["--config-dir", "a=1"]
    assert options_first(["a=1", "--experimental-rerun", "x"]) == ["--experimental-rerun", "x", "a=1"]


def test_info_takes_no_override_for_its_value():
    assert program.options_first(["a=1", "--info"]) == ["--info=all", "a=1"]
    assert program.options_first(["-i", "a=1"]) == ["--info=all", "a=1"]
    assert program.options_first(["--info", "defaults", "a=1"]) == ["--info=defaults", "a=1"]
