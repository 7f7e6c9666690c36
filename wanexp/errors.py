"""The errors a user can cause. Each message is one line: what is wrong, what was found, what to write."""


class UserError(ValueError):
    """Bad input. The program prints the message alone and exits with code 2."""


class LayoutError(UserError):
    """A layout that makes no sense for these devices or this model; a sweep records such a cell as `skipped`."""


class KernelError(UserError):
    """A kernel asked for by name that these devices cannot run; a sweep records such a cell as `skipped`."""


class RunFailed(Exception):
    """A run that another launcher took to a process of its own ended badly; its record says the rest."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, of another model, or of a kind that is not supported."""
