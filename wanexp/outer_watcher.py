"""Watching the ranks of an outer torchrun from process 0: who is silent, who has failed, who is gone."""

import os
import time
from collections.abc import Callable

import torch.distributed as dist

from wanexp.events import Event
from wanexp.job import Job
from wanexp.launch import STACKS_S, Watcher
from wanexp.meeting import POLL_S, Meeting, parent_event
from wanexp.rank_process import RankProcess

LAST_WORDS_S = 0.5  # for the errors of other ranks to arrive


class OuterWatcher(Watcher):
    """The watcher of a launch whose ranks have other parents: events come and signals go through the meeting.

    exit_codes: of ranks that ended without a report or an error. lost: what is missing altogether, in a sentence.
    """

    answer_s = STACKS_S + 5 * POLL_S  # the way there and back

    def __init__(
        self, job: Job, meeting: Meeting, own: RankProcess, on_event: Callable[[Event], None]
    ) -> None:
        super().__init__(job, on_event)
        self.exit_codes: dict[int, int] = {}
        self.lost = ""
        self.nodes = job.nodes or (tuple(range(job.plan.layout.num_ranks)),)
        self._meeting, self._own = meeting, own
        self._num_orders = 0
        self._answered = dict.fromkeys(range(1, job.plan.layout.num_ranks), 0)
        self._tail = self  # type: ignore[assignment]  # what `poll` below gives

    def is_over(self) -> bool:
        done = len(self.heard.reports) == len(self._last_seen)
        return bool(done or self.timeout_message or self.heard.errors or self.exit_codes or self.lost)

    def call_the_roll(self, within_s: float) -> None:
        """After a rank has failed: hear what else went wrong, and see whether all parents are still there.

        Of a machine that is gone nothing is heard but the errors of those that miss it.
        """
        self._signal_ranks(0)
        begin = time.monotonic()
        while True:
            time.sleep(POLL_S)
            gone = [rank for rank, orders in self._answered.items() if orders < self._num_orders]
            seconds = time.monotonic() - begin
            if self.lost or seconds > within_s or (not gone and seconds > LAST_WORDS_S):
                break
        if gone and not self.lost:
            names = " and ".join(self.name_of(rank) for rank in gone)
            self.lost = f"{names} {'is' if len(gone) == 1 else 'are'} gone: no answer for {within_s:g} s"

    def node_of(self, rank: int) -> str:
        return self.job.plan.devices[self.job.plan.ranks[rank].devices[0]].node

    def name_of(self, rank: int) -> str:
        return f"rank {rank} on {self.node_of(rank)}" if len(self.nodes) > 1 else f"rank {rank}"

    def poll(self) -> list[Event]:
        """New events of all ranks; those of their parents are taken in here."""
        code = self._own.exit_code  # before its last events: a report may be among them
        try:
            events = self._own.new_events() + self._meeting.collect()
        except dist.DistNetworkError:
            where = os.environ.get("MASTER_ADDR")
            self.lost = f"torchrun's store on {where} is gone; was that machine, or its torchrun, ended?"
            return []
        told = set(self.heard.reports) | {event["rank"] for event in self.heard.errors}
        if code is not None:
            events.append(parent_event(0, "exit", code=code))
        told |= {event["rank"] for event in events if event["kind"] in ("report", "error")}
        for event in events:
            if event["kind"] == "exit" and event["rank"] not in told:
                self.exit_codes[event["rank"]] = event["code"]
            elif event["kind"] == "present":
                self._answered[event["rank"]] = event["order"]
        return [event for event in events if event["kind"] not in ("exit", "present")]

    def _signal_ranks(self, number: int) -> None:
        self._own.signal(number)
        try:
            self._meeting.tell(f"order/{self._num_orders}", int(number))
        except dist.DistNetworkError:
            return  # `poll` says so
        self._num_orders += 1
