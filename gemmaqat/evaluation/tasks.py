"""Exact-match accuracy on the generated tasks, teacher-forced.

An item counts if the most likely token is right at every position of its answer, the end of text
included. As long as all earlier tokens are right, greedy decoding sees the same context, so this
equals greedy decoding's exact match at the cost of one pass.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from gemmaqat.config import Experiment
from gemmaqat.data.packing import Batch
from gemmaqat.data.tasks import TaskItem, items, task_batches
from gemmaqat.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TaskSet:
    """Items and the packed batches that score them; both empty for data without tasks."""

    items: Sequence[TaskItem]
    batches: Sequence[Batch]


def make_task_set(experiment: Experiment, tokenizer: Tokenizer) -> TaskSet:
    """The hold-out items of the generated tasks; none for other data."""
    if experiment.data.source != "tasks" or not experiment.evaluation.items_per_task:
        return TaskSet((), ())
    chosen = items(experiment.data.holdout_seed, experiment.evaluation.items_per_task)
    batches = task_batches(
        chosen, tokenizer, experiment.data.sequence_length, experiment.evaluation.batch_size
    )
    return TaskSet(chosen, batches)


def exact_matches(
    correct: Sequence[Bool[np.ndarray, "B T"]], batches: Sequence[Batch], num_items: int
) -> Bool[np.ndarray, " items"]:
    """Whether each item's answer is right throughout.

    Args:
        correct: per batch, whether the most likely token is the target.
        batches: of a `TaskSet`.
        num_items: items in that set.
    """
    wrong = np.zeros(num_items, np.int64)
    answered = np.zeros(num_items, np.int64)
    for right, batch in zip(correct, batches, strict=True):
        answer = batch["answer_mask"]
        np.add.at(answered, batch["item_ids"][answer], 1)
        np.add.at(wrong, batch["item_ids"][answer & ~right], 1)
    assert np.all(answered > 0), "an item lost its answer in packing"
    return wrong == 0


def accuracies(
    task_items: Sequence[TaskItem], matches: Bool[np.ndarray, " items"]
) -> dict[str, float]:
    """`task/<name>` for every task, and their unweighted mean as `task_mean`; {} without items."""
    names = np.asarray([item.task for item in task_items])
    found = {
        f"task/{name}": float(np.mean(matches[names == name])) for name in dict.fromkeys(names)
    }
    return found | {"task_mean": float(np.mean(list(found.values())))} if found else {}
