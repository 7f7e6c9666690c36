"""Ranks that do not mean the same run are told so, all of them, before weights are loaded."""

import dataclasses
from pathlib import Path

import torch.distributed as dist

from tests.conftest import Composer
from tests.parallel.ranks import on_ranks
from wanexp.config import RunConfig
from wanexp.errors import UserError
from wanexp.parallel.agreement import check_agreement, fingerprint, first_difference
from wanexp.wan.weights import RandomWeights, open_weights
from wanexp.wan.write_checkpoint import write_checkpoint


def agree(rank: int, configs: list[RunConfig]) -> list[str]:
    """For each config, which rank 1 has another seed of, what the rank is told; then when all have the same."""
    told = []
    for config in [*configs, configs[0]]:
        is_last = len(told) == len(configs)
        own = dataclasses.replace(config, seed=5) if rank == 1 and not is_last else config
        try:
            check_agreement(fingerprint(own, [RandomWeights(own.model.architecture, own.seed)]))
            told.append("")
        except UserError as error:
            told.append(str(error))
        dist.barrier()
    return told


def test_another_seed_on_one_rank(run_config: Composer):
    by_rank = on_ranks(3, agree, [run_config()])
    assert len({tuple(told) for told in by_rank}) == 1, "all ranks end with the same sentence"
    different, same = by_rank[0]
    assert same == ""
    assert different.startswith("the config differs between rank 0 on ") and " and rank 1 on " in different
    assert different.endswith("give all machines the same")


def test_the_first_difference_is_named():
    told = [("a", {"x": "1", "y": "2"}), ("a", {"x": "1", "y": "2"}), ("b", {"x": "1", "y": "3"})]
    assert first_difference(told[:2]) == first_difference(told[:1]) == ""
    assert (
        first_difference(told)
        == "y differs between rank 0 on a (2) and rank 2 on b (3); give all machines the same"
    )


def changed(first: dict[str, str], second: dict[str, str]) -> set[str]:
    return {what for what in first if first[what] != second[what]}


def test_what_a_fingerprint_covers(run_config: Composer, tmp_path: Path):
    config = run_config()
    architecture = config.model.architecture
    own = fingerprint(config, [RandomWeights(architecture)])
    assert set(own) == {"the config", "the code of wanexp", "the version of torch", "the checkpoint"}
    assert own == fingerprint(run_config(), [RandomWeights(architecture)])
    assert changed(own, fingerprint(run_config("seed=1"), [RandomWeights(architecture)])) == {"the config"}
    assert changed(own, fingerprint(config, [RandomWeights(architecture, 1)])) == {"the checkpoint"}


def test_a_checkpoint_is_the_same_wherever_it_lies(run_config: Composer, tmp_path: Path):
    config = run_config("model.architecture.num_layers=1")
    architecture = config.model.architecture

    def found(name: str, seed: int, layout: str = "native") -> dict[str, str]:
        write_checkpoint(RandomWeights(architecture, seed), tmp_path / name, layout=layout)
        return fingerprint(config, open_weights(tmp_path / name, architecture))

    first = found("here", 0)
    assert changed(first, found("there", 0)) == set()
    assert changed(first, found("prefixed", 0, layout="prefixed")) == {"the checkpoint"}
    assert changed(first, found("other", 1)) == {"the checkpoint"}
