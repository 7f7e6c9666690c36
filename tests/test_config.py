"""conf/ composed whole, against the schema and the published sizes; and what the boundary refuses."""

import dataclasses
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from wanexp.config import MODES, WORKLOADS, RunConfig, conf_dir, register, to_dict
from wanexp.config_keys import LIST_EXAMPLES, unknown_key_message
from wanexp.config_reading import run_config_from_dict, to_run_config
from wanexp.errors import UserError

GROUPS = sorted(path.name for path in conf_dir().iterdir() if path.is_dir() and path.name != "hydra")
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((conf_dir() / group).glob("*.yaml"))]
NAMED_MACHINES = [name for group, name in OPTIONS if group == "hardware" and name not in ("auto", "cpu")]


@pytest.fixture(scope="module", autouse=True)
def _hydra():
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield


def composed(*overrides: str) -> RunConfig:
    return to_run_config(compose("config", overrides=list(overrides)))


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        composed(*overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_groups_are_all_here():
    wanted = "model hardware parallelism workload video precision offload tracking experiment sweep"
    assert set(GROUPS) == set(wanted.split())


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_file_composes_to_a_valid_config(group, option):
    plus = "+" if group in ("experiment", "sweep") else ""
    config = composed(f"{plus}{group}={option}")
    assert isinstance(config, RunConfig)
    for value in vars(config).values():
        assert not hasattr(value, "_metadata"), "OmegaConf must stay above the boundary"


@pytest.mark.parametrize(
    ("group", "name"),
    [option for option in OPTIONS if option[0] in ("model", "precision", "video", "offload")],
)
def test_a_file_and_the_name_in_it_are_the_same(group, name):
    assert getattr(composed(f"{group}={name}"), group).name == name


def test_the_default_run_is_tiny():
    config = composed()
    assert (config.model.name, config.video.name, config.parallelism.mode) == ("tiny", "tiny", "none")
    assert config.model.architecture.head_dim == 128
    assert config.model.architecture.num_parameters() < 30e6
    assert config.gpus is None and config.checkpoint is None


# As published: dim, ffn, heads, layers, channels in and out, experts, parameters in billions, shift, steps,
# guidance, boundary
SIZES = {
    "wan2.1_t2v_1.3b": (1536, 8960, 12, 30, 16, 16, 1, 1.419, 5, 50, [5], None),
    "wan2.1_t2v_14b": (5120, 13824, 40, 40, 16, 16, 1, 14.288, 5, 50, [5], None),
    "wan2.1_i2v_14b_480p": (5120, 13824, 40, 40, 36, 16, 1, 16.395, 3, 40, [5], None),
    "wan2.1_i2v_14b_720p": (5120, 13824, 40, 40, 36, 16, 1, 16.395, 5, 40, [5], None),
    "wan2.1_flf2v_14b": (5120, 13824, 40, 40, 36, 16, 1, 16.396, 16, 50, [5], None),
    "wan2.2_t2v_a14b": (5120, 13824, 40, 40, 16, 16, 2, 14.288, 12, 40, [4, 3], 0.875),
    "wan2.2_i2v_a14b": (5120, 13824, 40, 40, 36, 16, 2, 14.289, 5, 40, [3.5, 3.5], 0.9),
    "wan2.2_ti2v_5b": (3072, 14336, 24, 30, 48, 48, 1, 5.000, 5, 50, [5], None),
}


def test_every_model_but_tiny_is_in_the_size_table():
    assert {name for group, name in OPTIONS if group == "model"} == {*SIZES, "tiny"}


@pytest.mark.parametrize("name", SIZES)
def test_models_have_the_published_sizes(name):
    dim, ffn, heads, layers, inside, outside, experts, billions, shift, steps, guidance, boundary = SIZES[
        name
    ]
    model = composed(f"model={name}").model
    architecture = model.architecture
    assert (architecture.dim, architecture.ffn_dim, architecture.num_heads) == (dim, ffn, heads)
    assert (architecture.num_layers, architecture.in_channels, architecture.out_channels) == (
        layers,
        inside,
        outside,
    )
    assert (architecture.head_dim, architecture.text_dim, architecture.text_len) == (128, 4096, 512)
    assert architecture.freq_dim == 256
    assert round(architecture.num_parameters() / 1e9, 3) == billions
    assert (model.num_experts, model.shift, model.sampling_steps) == (experts, shift, steps)
    assert (model.guidance_scale, model.expert_boundary) == (guidance, boundary)


DATASHEET = (  # the other numbers of a device are measured, where somebody did
    "name",
    "memory_gib",
    "bf16_tflops",
    "fp32_tflops",
    "memory_bandwidth_gb_s",
    "link",
    "link_gb_s",
    "host_link_gb_s",
)


@pytest.mark.parametrize("name", NAMED_MACHINES)
def test_named_machines_have_every_number(name):
    hardware = composed(f"hardware={name}").hardware
    assert hardware.name == name and hardware.device_type == "cuda"
    assert hardware.num_devices == int(name.split("x_")[0])
    assert hardware.device is not None
    numbers = dataclasses.asdict(hardware.device)
    assert all(numbers[key] not in (None, "") for key in DATASHEET)


@pytest.mark.parametrize(
    "path", sorted((conf_dir() / "hardware" / "device").glob("*.yaml")), ids=lambda p: p.stem
)
def test_each_number_of_a_device_names_its_source(path: Path):
    keys = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    text = path.read_text()
    assert {line.split(":")[0] for line in keys} >= set(DATASHEET)
    for line in keys:
        if not line.startswith(("name:", "link:")):
            before = text[: text.index(line)].splitlines()
            assert "#" in line or before[-1].startswith("#"), line


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_says_what_it_buys_and_when_not_to_use_it(mode):
    comment = (conf_dir() / "parallelism" / f"{mode}.yaml").read_text().split("mode:")[0]
    assert "uys" in comment and "\n# Not for" in comment
    assert composed(f"parallelism={mode}").parallelism.mode == mode


@pytest.mark.parametrize("name", WORKLOADS)
def test_each_workload_has_a_file(name):
    assert composed(f"workload={name}").workload.name == name


def test_a_model_brings_its_video_and_the_command_line_wins():
    assert composed("model=wan2.1_t2v_14b").video.name == "480p"
    assert composed("model=wan2.2_ti2v_5b").video.name == "704p"
    assert composed("model=wan2.1_t2v_14b", "video=tiny").video.name == "tiny"
    assert composed("video=720p", "model=wan2.1_t2v_14b").video.name == "720p"
    assert composed("+experiment=mlperf_t2v_a14b").video.name == "mlperf"
    assert composed("+experiment=mlperf_t2v_a14b", "video=tiny").video.name == "tiny"


def test_the_mlperf_experiment_is_the_benchmark():
    config = composed("+experiment=mlperf_t2v_a14b")
    assert (config.video.width, config.video.height, config.video.num_frames) == (1280, 720, 81)
    assert (config.model.name, config.seed, config.workload.num_steps) == ("wan2.2_t2v_a14b", 42, 20)
    assert config.workload.guidance_scale == [4.0, 3.0]
    assert config.model.expert_boundary == 0.875


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ("workload.name=sleep", "workload.name 'sleep' does not exist; write one of: denoise, train"),
        (
            "verify=alwys",
            "verify 'alwys' does not exist (did you mean always?); write one of: auto, always, never",
        ),
        (
            "attention=flash",
            "attention 'flash'|sdpa_flash, sdpa_cudnn, sdpa_efficient, sdpa_math, fa3, fa4, fa3_fp8",
        ),
        ("precision.dtype=bf16", "precision.dtype 'bf16'|bfloat16, float16, float32"),
        (
            "parallelism.mode=ring",
            "parallelism.mode 'ring'|none, data_parallel, distributed, block_distribution, cfg_parallel",
        ),
        ("parallelism.block_placement=x", "parallelism.block_placement 'x'|contiguous, memory, interleaved"),
        ("hardware.device_type=tpu", "hardware.device_type 'tpu'|auto, cuda, cpu"),
        ("hardware=1x_h100 hardware.device.link=rope", "hardware.device.link 'rope'|nvlink, pcie"),
        ("hardware=1x_h100 hardware.device.memory_gib=0", "hardware.device.memory_gib is 0.0|above 0"),
        ("hardware.num_devices=0", "hardware.num_devices is 0; write 1 or more"),
        ("video.num_frames=10", "video.num_frames is 10|4n + 1, such as 9 or 13"),
        ("video.height=100", "video.height is 100|multiples of 16|96"),
        ("video.width=0", "video.width is 0; write 1 or more"),
        ("model=wan2.2_ti2v_5b video=720p", "video.height is 720; wan2.2_ti2v_5b takes multiples of 32|704"),
        ("workload.num_steps=0", "workload.num_steps is 0; write 1 or more"),
        ("workload.num_warmup_steps=-1", "workload.num_warmup_steps is -1; write 0 or more"),
        ("workload.batch_size=0", "workload.batch_size is 0; write 1 or more"),
        ("workload.learning_rate=0", "workload.learning_rate is 0.0; write a number above 0"),
        ("workload.guidance_scale=[4,3]", "workload.guidance_scale has 2 numbers; write one number"),
        ("model=wan2.2_t2v_a14b workload.guidance_scale=[1,2,3]", "has 3 numbers|or 2 (one an expert)"),
        ("workload.guidance_scale=[]", "workload.guidance_scale has 0 numbers"),
        ("gpus=[]", "gpus is empty|gpus=[0]"),
        ("gpus=[0,1,0]", "gpus names device 0 2 times; write each once"),
        ("gpus=[-1]", "gpus has -1; write device numbers of 0 or more"),
        ("seed=-1", "seed is -1; write 0 or more"),
        ("sweep_name=a/b", "sweep_name is 'a/b'|letters"),
        ("sweep_name=runs", "sweep_name is 'runs'"),
        ("limits.run_s=inf", "limits.run_s is inf; write a finite number"),
        ("limits.stall_s=0", "limits.stall_s is 0.0; write a number above 0"),
        ("limits.run_s=1e11", "limits.run_s is 1e+11; write 1e9 or less, in seconds"),
        ("limits.stall_s=1e11", "limits.stall_s is 1e+11; write 1e9 or less, in seconds"),
        ("model.architecture.freq_dim=255", "model.architecture.freq_dim is 255; write an even number"),
        (
            "hardware=2x_h200 hardware.device.attention_kernel=fa",
            "hardware.device.attention_kernel 'fa' does not exist (did you mean fa4?); write one of: auto",
        ),
        ("model.num_experts=2", "model.expert_boundary is null|model.expert_boundary=0.875"),
        ("model.num_experts=3 model.expert_boundary=0.9", "model.num_experts is 3; write 1, or 2"),
        ("tracking.uri='http://[::1:5000'", "tracking.uri is no address"),
        ("model.expert_boundary=2", "model.expert_boundary is 2.0; write a number between 0 and 1"),
        ("model.vae_stride=[8,8]", "model.vae_stride is [8, 8]|three numbers"),
        ("model.architecture.num_heads=3", "dim 512|3 heads"),
        ("model.architecture.num_heads=0", "model.architecture.num_heads is 0; write 1 or more"),
        ("model.architecture.clip_tokens=5", "model.architecture.clip_tokens is 5; write 0"),
        ("~model", "model.name has no value"),
        ("seed=${nope}", "seed: Interpolation key 'nope' not found"),
        ("gpus=[[0,1],[0,1,2,3]]", "gpus is [[0, 1], [0, 1, 2, 3]]; write plain numbers, such as gpus=[0,1]"),
        ("gpus=[{a:1}]", "gpus is [{'a': 1}]; write plain numbers"),
        ("parallelism.block_split=[[4],[4]]", "such as parallelism.block_split=[4,4]"),
        ("model.vae_stride=[[4],8,8]", "such as model.vae_stride=[4,8,8]"),
        ("workload.guidance_scale=[[5]]", "such as workload.guidance_scale=[5.0]"),
        ("model.guidance_scale=[[5]]", "such as model.guidance_scale=[5.0]"),
        ("workload.guidance_scale=[-5]", "workload.guidance_scale has -5.0; write 0 or more"),
        ("model.guidance_scale=[-5]", "model.guidance_scale has -5.0; write 0 or more"),
        ("ffn_chunks=289", "ffn_chunks is 289; write 288 (the video's tokens) or less"),
        (
            "offload.blocks=3",
            "offload.blocks is 3 with offload=none; write offload=block_swap offload.blocks=3",
        ),
        ("tracking.experiment=", "tracking.experiment is empty; write a name"),
        ("~video", "video.height has no value; write video=NAME"),
        ("+gpu=[0]", "gpu does not exist (did you mean gpus?); keys: model, hardware"),
        (
            "+workload.num_step=3",
            "workload.num_step does not exist (did you mean num_steps?); keys of workload: name",
        ),
    ],
)
def test_refusals_name_what_is_wrong_and_what_to_write(overrides, parts):
    message = refusal(*overrides.split(" "))
    for part in parts.split("|"):
        assert part in message


def test_what_comes_close_to_a_refusal_is_taken():
    config = composed(
        "workload.guidance_scale=[0]", "ffn_chunks=288", "offload=block_swap", "offload.blocks=3"
    )
    assert (config.workload.guidance_scale, config.ffn_chunks, config.offload.blocks) == ([0.0], 288, "3")


def test_every_key_that_takes_a_list_has_an_example_that_composes():
    keys = {
        f"{group.name}.{item.name}" if group else item.name
        for group in (None, *(item for item in dataclasses.fields(RunConfig) if is_group(item)))
        for item in dataclasses.fields(RunConfig if group is None else group.default_factory)
        if "list[" in str(item.type)
    }
    assert keys == set(LIST_EXAMPLES)
    composed("hardware=cpu", *(f"{key}={example}" for key, example in LIST_EXAMPLES.items()))


def is_group(item: dataclasses.Field) -> bool:
    return dataclasses.is_dataclass(item.default_factory)


def test_one_guidance_scale_serves_both_experts():
    config = composed("model=wan2.2_t2v_a14b", "workload.guidance_scale=[2]", "model.guidance_scale=[7]")
    assert config.workload.guidance_scale == [2.0, 2.0]
    assert config.model.guidance_scale == [7.0, 7.0]


def test_a_profile_can_be_added_and_changed():
    hardware = composed("+hardware/device=h100", "hardware.device.memory_gib=24").hardware
    assert hardware.name == "auto" and hardware.device is not None and hardware.device.memory_gib == 24
    device = composed("hardware=2x_rtx4090", "hardware/device=rtx3080").hardware.device
    assert device is not None and device.bf16_tflops == 59.5


def test_a_config_survives_the_way_through_json():
    for overrides in (["+experiment=mlperf_t2v_a14b", "hardware=2x_h200"], ["gpus=[0,1]", "workload=train"]):
        config = composed(*overrides)
        assert run_config_from_dict(to_dict(config)) == config


def test_a_record_of_another_version_is_read():
    values = to_dict(composed())
    values["of_the_future"] = 1
    values["workload"]["of_the_future"] = {"a": 1}
    del values["limits"], values["workload"]["num_warmup_steps"]
    assert run_config_from_dict(values) == composed()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"seed": "abc"}, "seed: Value 'abc'"),
        ({"seed": -1}, "seed is -1"),
        ({"video": {}}, "video.height has no value"),
        ({"model": {"architecture": {"num_heads": 0}}}, "num_heads is 0"),
        ({"model": None}, "model"),
    ],
)
def test_a_damaged_record_is_refused_in_one_line(change, part):
    with pytest.raises(UserError, match=part) as caught:
        run_config_from_dict(to_dict(composed()) | change)
    assert "\n" not in str(caught.value)


def test_messages_for_unknown_keys():
    assert unknown_key_message(RunConfig, "seed.x") == "seed.x does not exist; seed is a single value"
    assert unknown_key_message(RunConfig, "hardware.device.mem").startswith(
        "hardware.device.mem does not exist; keys of hardware.device: name, memory_gib"
    )
    assert "keys of model.architecture: dim" in unknown_key_message(RunConfig, "model.architecture.layers")


def test_an_installed_package_has_its_own_conf(monkeypatch, tmp_path):
    package = tmp_path / "site-packages" / "wanexp"
    (package / "conf").mkdir(parents=True)
    (tmp_path / "site-packages" / "conf").mkdir()  # of some other package
    monkeypatch.setattr("wanexp.config.__file__", str(package / "config.py"))
    assert conf_dir() == package / "conf"


def test_names_that_stand_twice_are_the_same():
    """The config knows them without torch; the modules that run them have their own."""
    from wanexp.config import ATTENTIONS, KERNELS
    from wanexp.planning.plan import LOSSY_ATTENTIONS
    from wanexp.wan import attention, fused

    assert {"auto", *attention.KERNELS} == set(ATTENTIONS)
    assert set(fused.KERNELS) == set(KERNELS)
    assert {name for name in attention.KERNELS if attention.is_lossy(name)} == set(LOSSY_ATTENTIONS)
