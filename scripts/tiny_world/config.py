"""What a training run is told: sizes and one section a stage, from a JSON file under `configs/`."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .checkpoint import TrainingError
from .models import Sizes

CONFIGS = Path(__file__).parent / "configs"
STAGES = ("vae", "flow", "few_step")


@dataclass(frozen=True)
class Stage:
    """Budget and batch of a stage; `batch` and clips count per process, `frames` are pixel frames of a clip.

    `lr` is the peak rate of Muon, which trains the matrices; AdamW trains everything else at `adam_lr`.
    """

    minutes: float
    batch: int
    lr: float
    clips: int
    frames: int
    adam_lr: float = 0.0
    long_clips: int = 0
    steps: int | None = None


@dataclass(frozen=True)
class Config:
    """A whole run."""

    name: str
    sizes: Sizes
    stages: dict[str, Stage]

    @property
    def toy(self) -> bool:
        """Whether this only tests the trainer itself."""
        return self.name == "toy"

    def stage(self, name: str) -> Stage:
        """The section of a stage."""
        return self.stages[name]

    def describe(self) -> dict[str, int]:
        """The sizes as plain data, which every checkpoint carries."""
        return asdict(self.sizes)

    def change(self, stage: str, **values: float | int | None) -> "Config":
        """The same with other values for a stage; None leaves a value."""
        given = {name: value for name, value in values.items() if value is not None}
        return replace(self, stages=self.stages | {stage: replace(self.stages[stage], **given)})  # type: ignore[arg-type]

    def without_gpu(self) -> "Config":
        """The same model at a batch and a bank that two CPU cores can take."""
        small = {
            name: replace(
                stage,
                batch=max(2, stage.batch // 12),
                clips=min(stage.clips, 96),
                long_clips=min(stage.long_clips, 4),
            )
            for name, stage in self.stages.items()
        }
        return replace(self, stages=small)


def load_config(name: str) -> Config:
    """A config by the name of its file, or its path. Raises `TrainingError` for one that cannot be read."""
    path = Path(name) if name.endswith(".json") else CONFIGS / f"{name}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        sizes = Sizes(**content["sizes"])
        stages = {stage: Stage(**content[stage]) for stage in STAGES}
    except FileNotFoundError as error:
        known = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.json")))
        raise TrainingError(f"there is no config '{name}'; take one of {known}, or the path of a .json file") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"the config '{path}' cannot be used: {error}") from error
    return Config(path.stem, sizes, stages)
