"""rich's console, for a program whose records matter more than who reads along."""

from contextlib import suppress
from typing import Any

import rich.console


class Screen(rich.console.Console):
    """Falls silent where nothing more can be printed, and the run goes on."""

    def on_broken_pipe(self) -> None:
        """The reader has gone, as in `| head`; rich itself would end the program here."""
        with suppress(SystemExit):
            super().on_broken_pipe()

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError:  # such as a full disk
            self.quiet = True
