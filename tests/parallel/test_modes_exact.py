"""Every mode and hybrid gives the answer of mode none, in fp32, as real runs of real ranks find it.

Each case is a run as a worker does it (`RankRun`) on gloo ranks, and its reference as the parent launches it. Compared
are the flows that the parity check compares, the latent after three steps on every rank (for training the gradients,
and the weights after two steps), and what each device holds. All cases of a number of ranks share their processes.
"""

from functools import cache
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor

from tests.conftest import cpu_devices
from tests.parallel.mode_cases import CASES, Case
from tests.parallel.mode_runs import run_all, run_over_peers, run_reference, run_with_swapped_guidance
from tests.parallel.ranks import on_ranks
from wanexp.config import MODES
from wanexp.job import Job
from wanexp.measure.memory import GIB
from wanexp.parallel.traffic import fsdp_bytes, tensor_parallel_bytes
from wanexp.planning.plan import make_plan
from wanexp.workloads.sizes import latent_shape, num_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-5
ALL = [(ranks, name) for ranks, cases in CASES.items() for name in cases]


def job_of(case: Case, folder: Path) -> Job:
    folder.mkdir(exist_ok=True)
    plan = make_plan(case.config, cpu_devices(case.layout.num_devices))
    return Job(config=case.config, plan=plan, folder=folder, run_folder=folder, num_threads=1)


Result = tuple[Job, list[dict], dict]
"""Of one case its job, what each rank found, and what the reference did."""


def result_of(ranks: int, name: str) -> Result:
    results = results_of(ranks)
    if isinstance(results, Exception):
        raise results
    return results[name]


@cache
def results_of(ranks: int) -> dict[str, Result] | Exception:
    """All cases of this many ranks; what went wrong is kept too, for it takes minutes where ranks wait for others."""
    try:
        with TemporaryDirectory() as temporary:
            jobs = {
                name: job_of(case, Path(temporary) / str(number))
                for number, (name, case) in enumerate(CASES[ranks].items())
            }
            by_rank = [run_all(0, jobs)] if ranks == 1 else on_ranks(ranks, run_all, jobs)
            found = {name: [results[name] for results in by_rank] for name in jobs}
            return {
                name: (job, found[name], run_reference(job, found[name][0]["report"]["effective"]))
                for name, job in jobs.items()
            }
    except Exception as error:
        return error


def rel_l2(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize(("ranks", "name"), ALL)
def test_the_answer_is_that_of_mode_none(ranks, name):
    job, found, reference = result_of(ranks, name)
    assert len(found) == job.plan.layout.num_ranks == ranks
    parity, bit_equal = reference["parity"], job.plan.must_be_bit_equal(job.config)
    print(f"{ranks} ranks, {name}, {job.plan.layout}: {parity}")
    assert parity["rel_l2"] <= EXACT
    assert parity["bit_equal"] or not bit_equal
    for share, result in zip(job.plan.ranks, found, strict=True):
        answer, expected = result["answer"], reference["answer"]
        if CASES[ranks][name].train:
            assert rel_l2(answer, expected) <= EXACT
            way = expected - reference["before"]
            assert rel_l2(answer - reference["before"], way) <= 1e-2, "AdamW blows rounding up"
        else:
            expected = expected[share.first_sample : share.first_sample + share.num_samples]
            assert answer.shape == expected.shape
            assert rel_l2(answer, expected) <= EXACT
            assert torch.equal(answer, expected) or not bit_equal


@pytest.mark.parametrize(
    ("ranks", "name"),
    [
        (2, "cfg x shard, experts"),
        (2, "ulysses, 5 heads, i2v"),
        (4, "fsdp, ti2v, two groups of shards"),
        (4, "ring x ulysses, 3 heads"),
        (4, "ulysses x shard, experts"),
    ],
)
def test_the_answer_over_peer_memory(ranks, name, tmp_path):
    job = job_of(CASES[ranks][name], tmp_path)
    found = on_ranks(ranks, run_over_peers, job)
    reference = run_reference(job, found[0]["report"]["effective"])
    assert found[0]["report"]["effective"]["transport"] == "copies"
    assert reference["parity"]["rel_l2"] <= EXACT
    assert reference["parity"]["bit_equal"] or not job.plan.must_be_bit_equal(job.config)
    for share, result in zip(job.plan.ranks, found, strict=True):
        expected = reference["answer"][share.first_sample : share.first_sample + share.num_samples]
        assert rel_l2(result["answer"], expected) <= EXACT
        # Once, while loading: no step waits for new memory.
        assert result["grown"] == (1 if job.plan.layout.ulysses > 1 else None)


@pytest.mark.parametrize(("ranks", "name"), ALL)
def test_every_device_holds_the_weights_that_the_plan_says(ranks, name):
    job, found, _ = result_of(ranks, name)
    held = [round(gib * GIB) for result in found for gib in result["report"]["weight_gib"]]
    assert held == list(job.plan.weight_bytes)


@pytest.mark.parametrize(("ranks", "name"), ALL)
def test_bytes_sent_are_those_of_the_formulas(ranks, name):
    """Under a product every axis sends its own formula, for what the other axes leave to a rank."""
    job, found, _ = result_of(ranks, name)
    layout, config = job.plan.layout, job.config
    architecture, tokens = config.model.architecture, num_tokens(config.model, config.video)
    for share, result in zip(job.plan.ranks, found, strict=True):
        sent = result["report"]["bytes_per_forward"]
        size = {"element_size": 4, "training": False}
        expected = {}
        if layout.shard > 1:
            replicas = layout.num_ranks // layout.shard if CASES[ranks][name].train else 1
            size["training"] = CASES[ranks][name].train
            expected["shard"] = fsdp_bytes(
                architecture.num_parameters(), shards=layout.shard, replicas=replicas, **size
            )
        if layout.tp > 1 and layout.ring == layout.ulysses == 1:
            expected["tp"] = tensor_parallel_bytes(
                architecture, batch=share.num_samples, tokens=tokens, element_size=4, degree=layout.tp
            )
        if layout.cfg > 1:
            expected["cfg"] = 4 * share.num_samples * prod(latent_shape(config.model, config.video))
        for axis, num_bytes in expected.items():  # a rank computes one of cfg forwards of a step
            assert sent[axis] == num_bytes / layout.cfg, axis
        mine = {
            "tp": layout.tp > 1,
            "shard": layout.shard > 1,
            "context": layout.ring * layout.ulysses > 1,
            "blocks": layout.blocks > 1,
            "cfg": layout.cfg > 1,
        }
        assert {axis for axis, is_used in mine.items() if is_used} == set(sent)


@pytest.mark.parametrize(("ranks", "name"), ALL)
def test_every_group_of_the_layout_was_checked(ranks, name):
    job, found, _ = result_of(ranks, name)
    layout = job.plan.layout
    axes = {axis for axis, degree in layout.degrees().items() if degree > 1} - {"blocks"}
    axes -= {"dp"} if layout.shard > 1 else set()  # under FSDP the mesh has the replicas
    for rank, result in enumerate(found):
        links = {link["axis"]: tuple(link["ranks"]) for link in result["report"]["links"]}
        is_copied = layout.num_ranks > layout.shard > 1
        assert (links.pop("replicate", None) is not None) == is_copied
        assert links.keys() == axes
        assert all(members in layout.groups(axis) and rank in members for axis, members in links.items())


def test_every_mode_is_among_them_with_two_devices_and_with_four():
    for devices in (2, 4):
        modes = {case.config.parallelism.mode for _, case in cases() if case.layout.num_devices == devices}
        without_four = {"none"} if devices == 2 else {"none", "cfg_parallel"}
        assert modes >= set(MODES) - without_four
    hybrids = {str(case.layout) for ranks, case in cases() if ranks == 8 and not case.train}
    assert len(hybrids) >= 12


def cases() -> list[tuple[int, Case]]:
    return [(ranks, CASES[ranks][name]) for ranks, name in ALL]


def test_a_wrong_answer_is_found(tmp_path):
    """The checks above can fail."""
    job = job_of(CASES[2]["cfg_parallel"], tmp_path)
    effective = on_ranks(2, run_with_swapped_guidance, job)[0]
    parity = run_reference(job, effective)["parity"]
    assert parity["rel_l2"] > 100 * EXACT and not parity["bit_equal"]
