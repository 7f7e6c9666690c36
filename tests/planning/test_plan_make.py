"""Plans: who owns which devices, samples, blocks and bytes."""

import pytest

from tests.conftest import TWO_EXPERTS, Composer, cpu_devices
from wanexp.errors import LayoutError, UserError
from wanexp.hardware.devices import Device
from wanexp.planning.plan import RankPlan, make_plan, reference_plan


def test_replicas_share_the_batch_in_order(run_config: Composer):
    config = run_config("parallelism=data_parallel", "workload.batch_size=5")
    plan = make_plan(config, cpu_devices(3))
    assert plan.ranks == (RankPlan(0, (0,), 0, 2), RankPlan(1, (1,), 2, 2), RankPlan(2, (2,), 4, 1))
    assert plan.batch_size == 5 and plan.block_owner == (0, 0, 0, 0)
    assert plan.mode == "data_parallel" and plan.device_type == "cpu"
    assert set(plan.weight_bytes) == {config.model.architecture.num_parameters() * 4}


def test_one_sample_a_replica_unless_asked(run_config: Composer):
    assert make_plan(run_config("parallelism=data_parallel"), cpu_devices(3)).batch_size == 3
    assert make_plan(run_config("parallelism=block_distribution"), cpu_devices(3)).batch_size == 1


def test_blocks_of_one_rank(run_config: Composer):
    config = run_config("parallelism=block_distribution", "precision=bf16", *TWO_EXPERTS)
    plan = make_plan(config, cpu_devices(3))
    assert plan.ranks == (RankPlan(0, (0, 1, 2), 0, 1),)
    assert plan.block_owner == (0, 0, 1, 2)
    architecture = config.model.architecture
    block, element = architecture.num_block_parameters(), 2 * 2  # bf16, two experts
    head = 128 * 2 + 64 * 128 + 64  # modulation, weight and bias
    embeddings = architecture.num_outer_parameters() - head
    assert plan.weight_bytes == (
        (2 * block + embeddings) * element,
        block * element,
        (block + head) * element,
    )
    assert sum(plan.weight_bytes) == architecture.num_parameters() * element


def test_training_holds_master_weights(run_config: Composer):
    config = run_config("workload=train", "precision=bf16")
    assert make_plan(config, cpu_devices(1)).weight_bytes == (config.model.architecture.num_parameters() * 4,)


@pytest.mark.parametrize(
    ("overrides", "owner"),
    [
        (("parallelism.block_split=[3,1]",), (0, 0, 0, 1)),
        (("parallelism.block_placement=interleaved",), (0, 1, 0, 1)),
        (("parallelism.block_placement=memory",), (0, 1, 1, 1)),
    ],
)
def test_placements(run_config: Composer, overrides, owner):
    config = run_config("parallelism=block_distribution", *overrides)
    assert make_plan(config, cpu_devices(2, (10, 70))).block_owner == owner


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ("workload.batch_size=1",),
            "workload.batch_size 1 is smaller than the 2 replicas; write workload.b",
        ),
        (("workload=train",), "has none; write parallelism=distributed"),
        (
            ("workload=train", "parallelism=distributed", "workload.batch_size=3"),
            "3 is not a multiple of the 2",
        ),
        (("parallelism=none",), "mode none uses one device"),
        (
            ("offload.buffers=3",),
            "offload.buffers is 3 and no block is swapped; write offload=block_swap too",
        ),
    ],
)
def test_layouts_that_make_no_sense(run_config: Composer, overrides, words):
    with pytest.raises(LayoutError, match=words):
        make_plan(run_config("parallelism=data_parallel", *overrides), cpu_devices(2))


@pytest.mark.parametrize(
    ("capability", "dtype", "words"),
    [
        ((8, 6), "bfloat16", "needs float8 units, from compute capability 8.9 on, a GPU has 8.6; write"),
        ((9, 0), "float16", "computes in bfloat16, precision.dtype is float16; write precision=fp8"),
    ],
)
def test_float8_where_a_gpu_cannot_compute_in_it(run_config: Composer, capability, dtype, words):
    config = run_config("precision=fp8", f"precision.dtype={dtype}")
    gpu = Device("cuda", 0, "a GPU", 2**33, 2**33, compute_capability=capability)
    with pytest.raises(LayoutError, match=words):
        make_plan(config, [gpu])
    assert make_plan(run_config("precision=fp8_weight", f"precision.dtype={dtype}"), [gpu]).num_gpus == 1


@pytest.mark.parametrize("mode", ["data_parallel", "block_distribution"])
def test_the_reference_is_mode_none_on_the_first_device(run_config: Composer, mode):
    config = run_config(f"parallelism={mode}", "workload.batch_size=3")
    devices = cpu_devices(3)[::-1]
    plan = reference_plan(make_plan(config, devices), 2)
    assert plan.mode == "none" and plan.layout.num_devices == 1
    assert plan.devices == devices[:1]
    assert plan.ranks == (RankPlan(0, (0,), 0, 3),)
    assert plan.block_owner == (0, 0)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("parallelism=data_parallel",), True),
        (("parallelism=cfg_parallel",), True),
        (("parallelism=fsdp",), True),
        (("parallelism=block_distribution", "offload=block_swap", "offload.blocks=2"), True),
        (("parallelism=distributed", "workload=train"), False),
        (("parallelism=context_parallel",), False),
        (("parallelism=tensor_parallel",), False),
        (("parallelism=data_parallel", "precision=fp8"), False),
        (("parallelism=data_parallel", "attention=fa3_fp8"), False),
    ],
)
def test_what_must_be_bit_equal(run_config: Composer, overrides, expected):
    config = run_config(*overrides)
    assert make_plan(config, cpu_devices(2)).must_be_bit_equal(config) is expected


def test_training_two_experts_is_refused(run_config: Composer):
    config = run_config("workload=train", "model=wan2.2_t2v_a14b")
    with pytest.raises(UserError, match="trains one transformer"):
        make_plan(config, cpu_devices(1))
