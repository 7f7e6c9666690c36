"""Who holds up the others, from the collectives that each rank has begun."""

from wanexp.stall import culprit


def test_the_rank_behind_is_named():
    assert culprit([0, 1], {0: {"[0,1]": 8}, 1: {"[0,1]": 7}}) == (
        1,
        "holds up the others: it has begun 7 collectives of group [0,1], they 8",
    )


def test_of_a_chain_of_waiting_ranks_the_last_is_named():
    """Ulysses in pairs, ring across them: 3 is late, 2 waits for it, 0 waits for 2, 1 for 3."""
    begun = {
        0: {"[0,1]": 5, "[0,2]": 4},
        1: {"[0,1]": 5, "[1,3]": 4},
        2: {"[2,3]": 5, "[0,2]": 3},
        3: {"[2,3]": 4, "[1,3]": 3},
    }
    found = culprit(range(4), begun)
    assert found is not None and found[0] == 3


def test_a_rank_that_does_not_answer_is_named_first():
    assert culprit([0, 1, 2], {0: {"[0,1,2]": 8}, 2: {"[0,1,2]": 7}}) == (1, "does not answer")


def test_a_rank_that_has_come_to_its_end_need_not_answer():
    assert culprit([0], {0: {"[0,1]": 8}}) is None


def test_nobody_is_named_where_nothing_tells():
    assert culprit([0, 1], {0: {"[0,1]": 8}, 1: {"[0,1]": 8}}) is None
    assert culprit([0, 1], {}) is None
