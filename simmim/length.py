"""How long a training run is, in optimizer steps."""

from dataclasses import dataclass

from simmim.config import Config
from simmim.devices import accumulation, world_size


@dataclass(frozen=True)
class Length:
    """How long a run is, in optimizer steps."""

    images_per_step: int
    steps_per_epoch: int
    total_steps: int
    max_epochs: float

    @property
    def steps_between_validations(self) -> int:
        """An epoch, or the whole of a shorter run."""
        return max(1, min(self.steps_per_epoch, self.total_steps))

    def steps(self, epochs: float) -> int:
        """Epochs of the schedule in steps: a run cut or stretched by `trainer.max_steps` keeps its shape."""
        return round(epochs * self.total_steps / self.max_epochs) if self.total_steps else 0


def run_length(config: Config, images: int) -> Length:
    """Counts a run over so many training images in optimizer steps.

    Raises:
        ValueError: If it shall have steps, but no epochs.
    """
    trainer = config["trainer"]
    if trainer["max_epochs"] == 0 and trainer["max_steps"]:
        raise ValueError(
            f"trainer.max_epochs=0 evaluates alone, and trainer.max_steps={trainer['max_steps']} trains: give one of "
            "them"
        )
    images_per_step = config["data"]["batch_size"] * accumulation(config) * world_size(config)
    steps_per_epoch = max(1, round(images / images_per_step))
    total_steps = trainer["max_steps"] or round(trainer["max_epochs"] * steps_per_epoch)
    if trainer["max_epochs"] > 0:
        total_steps = max(1, total_steps)
    return Length(images_per_step, steps_per_epoch, total_steps, trainer["max_epochs"])
