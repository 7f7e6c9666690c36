"""A model at a video size on some GPUs, as bench_floor.py and bench_peers.py take it: `model:video:gpus`."""

from dataclasses import dataclass
from functools import cache

from hydra import compose, initialize_config_dir

from wanexp.config import RunConfig, conf_dir, register
from wanexp.config_reading import to_run_config
from wanexp.errors import UserError
from wanexp.wan.architecture import WanArchitecture
from wanexp.workloads.sizes import latent_shape, num_tokens


@dataclass(frozen=True)
class Case:
    """model, video: names of `conf/`. num_gpus: that work on one forward."""

    model: str
    video: str
    num_gpus: int = 1

    def __str__(self) -> str:
        gpus = "1 GPU" if self.num_gpus == 1 else f"{self.num_gpus} GPUs"
        return f"{self.model} {self.video}, {gpus}"

    @property
    def architecture(self) -> WanArchitecture:
        return _composed(self.model, self.video).model.architecture

    @property
    def num_tokens(self) -> int:
        config = _composed(self.model, self.video)
        return num_tokens(config.model, config.video)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """[channels, frames, height, width]"""
        config = _composed(self.model, self.video)
        return latent_shape(config.model, config.video)

    @property
    def flops(self) -> int:
        """Of a forward."""
        return self.architecture.forward_flops(self.num_tokens)


@cache
def _composed(model: str, video: str) -> RunConfig:
    """As the main job composes it. Raises hydra's errors for names that are not in `conf/`."""
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return to_run_config(
            compose("config", overrides=[f"model={model}", f"video={video}", "tracking=none"])
        )


def parse_case(text: str) -> Case:
    """Raises UserError for anything but `model:video` or `model:video:gpus`."""
    model, _, rest = text.partition(":")
    video, _, gpus = rest.partition(":")
    if not model or not video or (gpus and not gpus.isdecimal()) or gpus == "0":
        raise UserError(f"a case is model:video:gpus, such as wan2.1_t2v_14b:480p:1; found {text!r}")
    return Case(model, video, int(gpus or 1))
