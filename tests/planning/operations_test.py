"""Operations: the closed form against XLA's own count, and estimates that scale."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from gemmaqat.config import CompareConfig, Experiment, TrainConfig
from gemmaqat.models.sizes import model_config
from gemmaqat.planning import operations
from gemmaqat.planning.parameters import abstract_model
from gemmaqat.planning.report import plan_comparison, plan_training


@pytest.mark.parametrize("name", ["e2b_mini", "12b_mini"])
def test_forward_operations_are_near_what_xla_counts(name):
    config = model_config(name, embed_dim=256, mlp_dim=1024)
    length = 64
    graphdef, state = nnx.split(abstract_model(config))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    forward = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens).logits)
    counted = forward.lower(state, tokens).cost_analysis()["flops"]
    # XLA also counts norms, activations and the masked half of the attention.
    assert 0.8 < operations.forward_operations(config, length=length) * length / counted < 1.05


def test_a_window_caps_the_attention():
    config = model_config("31b")
    grows = [operations.forward_operations(config, length=n) for n in (512, 4096, 32_768)]
    wide = dataclasses.replace(config, sliding_window=10**6)
    assert grows[0] < grows[1] < grows[2] < operations.forward_operations(wide, length=32_768)


def test_methods_and_remat_cost_what_they_run_again():
    experiment = Experiment(train=TrainConfig(method="none"))
    config = model_config("e2b_mini")
    plain = operations.step_operations(experiment, config, method="none")
    assert operations.step_operations(experiment, config, method="distill") == plain * 4 // 3
    remat = dataclasses.replace(config, remat="full")
    assert operations.step_operations(experiment, remat, method="distill") == plain * 5 // 3
    compare = CompareConfig(base_steps=6, arm_steps=3, recipes=("a", "b"), seeds=(0, 1))
    total = operations.comparison_operations(Experiment(compare=compare), config)
    # Per seed: base 6, control 3, and for each recipe QAT 3 and distilled QAT 3 (a third more).
    assert total == 2 * (9 * plain + 2 * (3 * plain + 3 * plain * 4 // 3))


def test_plans_render_for_training_and_comparison():
    text = plan_training(Experiment(), model_config("e2b_mini")).render()
    assert "300,708 parameters" in text and "optimizer state" in text and "roughly" in text
    (plan,) = plan_comparison(Experiment())
    assert plan.fits and plan.seconds > 0 and "teacher" in plan.render()


@pytest.mark.parametrize(
    "seconds, text",
    [(40.0, "40 s"), (720.0, "12 min"), (12_600.0, "3.5 h"), (800_000.0, "9 days")],
)
def test_durations_read_well(seconds, text):
    assert operations.format_seconds(seconds) == text
