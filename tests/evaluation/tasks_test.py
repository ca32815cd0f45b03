"""Exact match: every answer token of an item counts, nothing else does."""

import numpy as np

from gemmaqat.data.tasks import TaskItem
from gemmaqat.evaluation import tasks

ITEMS = [TaskItem("copy", "C a=", "a"), TaskItem("copy", "C b=", "b"), TaskItem("sort", "S=", "c")]
# Two rows; item 0 and 1 share the first, item 2 stands in the second; the rest is padding.
IDS = np.asarray([[0, 0, 0, 1, 1, 1], [2, 2, 2, 2, -1, -1]])
ANSWER = np.asarray([[0, 1, 1, 0, 1, 1], [0, 0, 1, 1, 0, 0]], bool)
BATCH = {"item_ids": IDS, "answer_mask": ANSWER}


def test_an_item_is_solved_only_if_all_its_answer_tokens_are_right():
    correct = ANSWER.copy()
    correct[0, 4] = False
    found = tasks.exact_matches([correct], [BATCH], 3)
    np.testing.assert_array_equal(found, [True, False, True])


def test_prompt_and_padding_do_not_count():
    np.testing.assert_array_equal(tasks.exact_matches([ANSWER], [BATCH], 3), [True] * 3)


def test_accuracy_is_given_per_task_and_as_their_unweighted_mean():
    found = tasks.accuracies(ITEMS, np.asarray([True, False, True]))
    assert found == {"task/copy": 0.5, "task/sort": 1.0, "task_mean": 0.75}


def test_data_without_tasks_have_no_task_scores():
    assert tasks.accuracies([], np.zeros(0, bool)) == {}
    assert tasks.exact_matches([], [], 0).shape == (0,)
