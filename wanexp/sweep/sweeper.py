"""The sweeper plugin of Hydra that spares every cell a second composition."""

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

from wanexp.sweep.launcher import SweepLauncher


class SweepSweeper(BasicSweeper):
    """Hydra's basic sweeper, which composes each cell of a batch to see that it can be, and throws it away.

    `SweepLauncher` composes and checks all of them before it runs one, so for it that is left out: a third of a second
    a cell on a slow core. Other launchers, such as submitit's, may compose in a job, where a mistake comes late.
    """

    __module__ = "hydra_plugins.wanexp"  # Hydra instantiates plugins of this namespace only

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        if not isinstance(self.launcher, SweepLauncher):
            super().validate_batch_is_legal(batch)
