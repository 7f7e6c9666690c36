"""Which steps run before the timed ones, and what a short schedule leaves out."""

import pytest

from tests.conftest import TWO_EXPERTS
from wanexp.workloads import schedule


@pytest.mark.parametrize(("warmups", "steps"), [(0, []), (1, [0, 2]), (2, [0, 0, 2, 2])])
def test_each_expert_is_warmed_up(run_config, warmups, steps):
    config = run_config(*TWO_EXPERTS, "model.shift=5", f"workload.num_warmup_steps={warmups}")
    assert schedule.experts_of_steps(config) == [0, 0, 1, 1]
    assert schedule.warmup_steps(config) == steps


def test_a_schedule_that_ends_before_an_expert_says_so(run_config):
    config = run_config(*TWO_EXPERTS, "model.shift=5", "workload.num_steps=1")
    assert schedule.missed_expert_warning(config).startswith("workload.num_steps=1 reaches one of 2 experts")
    assert schedule.missed_expert_warning(run_config(*TWO_EXPERTS, "model.shift=5")) == ""
    assert schedule.missed_expert_warning(run_config("workload.num_steps=1")) == ""
