"""Which rank holds up the others? Every group counts the collectives that each of its ranks has begun. Pure."""

from collections.abc import Collection, Mapping

Begun = Mapping[str, int]
"""Collectives begun by one rank, by group; a group has the same name on all its ranks."""


def culprit(working: Collection[int], begun: Mapping[int, Begun]) -> tuple[int, str] | None:
    """The rank that a stalled launch waits for and how that is known; None where nothing tells.

    working: ranks that have not come to their end. begun: of those that answered when they were asked. A rank that
    does not answer is frozen, or gone. Else it is one that has begun fewer collectives than others of a group, and in
    no group more: whoever is ahead somewhere waits there for somebody else.
    """
    if silent := sorted(set(working) - begun.keys()):
        return (silent[0], "does not answer") if begun else None
    behind: dict[int, str] = {}
    ahead: set[int] = set()
    for group in sorted({group for groups in begun.values() for group in groups}):
        counts = {rank: groups[group] for rank, groups in begun.items() if group in groups}
        most = max(counts.values())
        for rank, count in counts.items():
            if count < most:
                behind.setdefault(
                    rank,
                    f"holds up the others: it has begun {count} collectives of group {group}, they {most}",
                )
            elif min(counts.values()) < most:
                ahead.add(rank)
    return min(((rank, why) for rank, why in behind.items() if rank not in ahead), default=None)
