"""The plan of an experiment as text: parameters, memory and time, before anything runs."""

import dataclasses

import jax

from gemmaqat.config import Experiment
from gemmaqat.models.config import ModelConfig
from gemmaqat.models.sizes import model_config
from gemmaqat.planning.devices import format_bytes, free_bytes
from gemmaqat.planning.memory import MemoryPlan, generation_memory, training_memory
from gemmaqat.planning.operations import (
    comparison_operations,
    estimate_seconds,
    format_seconds,
    measure_speed,
    step_operations,
)
from gemmaqat.planning.parameters import count_parameters

_GENERATION_LENGTH = 4096


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one model of an experiment needs. Seconds are rough: within a factor of two."""

    config: ModelConfig
    parameters: int
    training: MemoryPlan
    generation: MemoryPlan
    free_bytes: int | None  # of the default device
    operations: int  # of the whole run
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether the training memory is free now (True where the device does not tell)."""
        return self.free_bytes is None or self.training.total <= self.free_bytes

    def render(self) -> str:
        """The plan for a terminal."""
        device = jax.devices()[0]
        free = "unknown" if self.free_bytes is None else format_bytes(self.free_bytes)
        verdict = "fits" if self.fits else "does NOT fit; " + _remedies(self.config)
        kind, config = device.device_kind, self.config
        return "\n".join(
            (
                f"{config.name}: {self.parameters:,} parameters, {config.num_layers} layers",
                "memory of a training step:",
                self.training.render(),
                f"  free on {kind}: {free} ({verdict})",
                f"memory of decoding one sequence of {_length(config)} positions, unquantized:",
                self.generation.render(),
                f"training: {self.operations:.3g} operations, roughly "
                f"{format_seconds(self.seconds)} on {kind} (without compilation and evaluation)",
            )
        )


def plan_training(experiment: Experiment, config: ModelConfig) -> Plan:
    """The plan of `gemmaqat train`."""
    operations = experiment.train.num_steps * step_operations(
        experiment, config, method=experiment.train.method
    )
    return _plan(experiment, config, operations)


def plan_comparison(experiment: Experiment) -> list[Plan]:
    """The plan of `gemmaqat compare`, one per size; memory is that of its largest arm."""
    distill = dataclasses.replace(
        experiment, train=dataclasses.replace(experiment.train, method="distill")
    )
    plans = []
    for size in experiment.compare.sizes:
        section = experiment.model
        config = model_config(
            size, dtype=section.dtype, param_dtype=section.param_dtype, remat=section.remat
        )
        plans.append(_plan(distill, config, comparison_operations(distill, config)))
    return plans


def _plan(experiment: Experiment, config: ModelConfig, operations: int) -> Plan:
    tokens = experiment.data.batch_size * experiment.data.sequence_length
    speed = measure_speed(config, tokens=tokens // experiment.train.accumulation_steps)
    return Plan(
        config=config,
        parameters=count_parameters(config),
        training=training_memory(experiment, config),
        generation=generation_memory(config, batch_size=1, length=_length(config)),
        free_bytes=free_bytes(),
        operations=operations,
        seconds=estimate_seconds(operations, speed=speed),
    )


def _remedies(config: ModelConfig) -> str:
    ways = ["optimizer.name=adafactor", "more train.accumulation_steps", "a shorter sequence"]
    if config.remat == "none":
        ways.insert(0, "model.remat=full")
    return f"try {', '.join(ways)}, or a smaller size"


def _length(config: ModelConfig) -> int:
    return min(_GENERATION_LENGTH, config.max_position)
