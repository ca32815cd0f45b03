"""The generated task language: seven small skills with exact answers, no download.

A task example is a prompt and an answer, `S qbc=` and `bcq`. Tokens of the answer and the end
of text after it carry the loss; an item is solved when every one of them is predicted, which is
what greedy decoding would produce.

Every example is a function of (seed, index), so a stream of any length needs no storage and any
position of it can be read directly. A prompt belongs to the hold-out if its checksum says so:
training and hold-out share no prompt, whatever their seeds.
"""

import dataclasses
import random
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from gemmaqat.data.documents import Document, Piece
from gemmaqat.data.packing import TOKEN_DTYPE, Batch, encode, pack_all
from gemmaqat.data.tokenizer import Tokenizer

LANGUAGE_VERSION = 3  # raised with every change below: a saved position is void after it
HOLDOUT_MODULUS = 8  # one prompt in eight is never trained on

BLOCK_EXAMPLES = 16  # generated together, because Grain's cost is per element

# Settings of the tasks. They are chosen so that a model of 0.3 to 0.8 M parameters learns all of
# them within about 600 steps of 2,048 tokens: short prompts (about 100 examples per step), small
# alphabets, and answers whose tokens each depend on few positions of the prompt.
WORD_LENGTHS = (3, 8)  # of copy and reverse
WORD_ALPHABET = "abcdefghijklmnopqrstuvwxyz"
SORT_LENGTHS = (3, 6)
SORT_ALPHABET = "abcdefghij"
BRACKET_LENGTHS = (3, 10)  # of the opened text; its closing is the answer
# Addition without carry: each digit of the sum depends on two digits. The carry is what a miniature
# does not learn in the given steps, with either order of the digits.
ADDEND_DIGITS = 2
# Recall asks for all pairs and repeats each key: several lookups in one example. One question
# after 2 to 4 pairs is what a miniature does not learn in the given steps.
RECALL_PAIRS = (2, 3)
RECALL_KEYS = "abcdefgh"
RECALL_VALUES = "0123456789"
NAMES = ("Ann", "Bob", "Cal", "Dan", "Eve", "Fay", "Gus", "Hal", "Ida", "Jim", "Kim", "Leo")
THINGS = (
    "axe", "bag", "cup", "drum", "egg", "fan", "globe", "hat", "ink", "jar", "kite", "lamp",
)  # fmt: skip
PLACES = (
    "attic", "barn", "cave", "den", "eyrie", "field", "gym", "hut", "inn", "jail", "kiosk", "lane",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TaskItem:
    """One question with its only right answer."""

    task: str
    prompt: str
    answer: str


def example(seed: int, index: int, *, holdout: bool = False, task: str | None = None) -> TaskItem:
    """The example at `index` of the stream of `seed`; of a drawn task unless one is named."""
    rng = random.Random(f"{seed}/{index}/{holdout}/{task}")
    name = task or rng.choices(TASK_NAMES, TASK_SHARES)[0]
    make = TASKS[name].make
    while True:
        prompt, answer = make(rng)
        if in_holdout(prompt) == holdout:
            return TaskItem(name, prompt, answer)


def in_holdout(prompt: str) -> bool:
    """Whether a prompt is kept from training."""
    return zlib.crc32(prompt.encode()) % HOLDOUT_MODULUS == 0


def items(seed: int, n_per_task: int) -> list[TaskItem]:
    """Hold-out items for scoring, `n_per_task` different prompts of every task, task by task."""
    chosen: list[TaskItem] = []
    for task in TASK_NAMES:
        found: dict[str, TaskItem] = {}
        index = last_new = 0
        while len(found) < n_per_task:
            item = example(seed, index, holdout=True, task=task)
            if item.prompt not in found:
                found[item.prompt] = item
                last_new = index
            index += 1
            if index - last_new > 1_000:  # so long without a new one: there are hardly any left
                raise ValueError(
                    f"task {task!r} has only {len(found)} hold-out prompts, {n_per_task} were "
                    "asked for; lower evaluation.items_per_task."
                )
        chosen += found.values()
    return chosen


def task_batches(
    task_items: Sequence[TaskItem], tokenizer: Tokenizer, length: int, batch_size: int
) -> list[Batch]:
    """Packs items for teacher-forced scoring.

    Returns:
        Batches with two more fields, `item_ids` [B, T] int32 (index into `task_items`, -1 in
        padding) and `answer_mask` [B, T] bool. An item is an exact match when the arg-max equals
        `targets` wherever `item_ids` is its index and `answer_mask` holds: over the whole answer
        and the end of text after it.

    Raises:
        ValueError: an item is longer than `length`.
    """
    parts = []
    for index, item in enumerate(task_items):
        encoded = encode(_document(item, 0.0, f"item {index} of {item.task}"), tokenizer)
        if len(encoded) > length:
            raise ValueError(
                f"item {index} of task {item.task!r} has {len(encoded)} tokens, more than the row "
                f"length {length}; raise data.sequence_length."
            )
        part = np.empty(len(encoded), _ITEM_DTYPE)
        for name in TOKEN_DTYPE.fields or ():
            part[name] = encoded[name]
        part["item_ids"] = index
        part["answer_mask"] = encoded["loss_weights"] > 0
        parts.append(part)
    return pack_all(parts, length, batch_size, padding={"item_ids": -1})


_ITEM_DTYPE = np.dtype(TOKEN_DTYPE.descr + [("item_ids", "i4"), ("answer_mask", "?")])


class TaskSource:
    """The stream of task examples as a random-access source of documents."""

    def __init__(self, seed: int, *, holdout: bool, prompt_weight: float):
        self._seed = seed
        self._holdout = holdout
        self._prompt_weight = prompt_weight
        self.fingerprint = f"tasks-{LANGUAGE_VERSION}-{seed}-{holdout}"

    def __len__(self) -> int:
        return 2**31  # examples are drawn independently; there is no epoch to reshuffle

    def __getitem__(self, index: int) -> list[Document]:
        """A block of examples."""
        documents = []
        for number in range(index * BLOCK_EXAMPLES, (index + 1) * BLOCK_EXAMPLES):
            item = example(self._seed, number, holdout=self._holdout)
            assert in_holdout(item.prompt) == self._holdout
            documents.append(_document(item, self._prompt_weight, f"task example {number}"))
        return documents

    def __repr__(self) -> str:
        return f"TaskSource(seed={self._seed}, holdout={self._holdout})"


def _document(item: TaskItem, prompt_weight: float, where: str) -> Document:
    return Document((Piece(item.prompt, prompt_weight), Piece(item.answer, 1.0)), where)


def _word(rng: random.Random, lengths: tuple[int, int], alphabet: str) -> str:
    return "".join(rng.choices(alphabet, k=rng.randint(*lengths)))


def _copy(rng: random.Random) -> tuple[str, str]:
    word = _word(rng, WORD_LENGTHS, WORD_ALPHABET)
    return f"C {word}=", word


def _reverse(rng: random.Random) -> tuple[str, str]:
    word = _word(rng, WORD_LENGTHS, WORD_ALPHABET)
    return f"R {word}=", word[::-1]


def _sort(rng: random.Random) -> tuple[str, str]:
    word = _word(rng, SORT_LENGTHS, SORT_ALPHABET)
    return f"S {word}=", "".join(sorted(word))


def _brackets(rng: random.Random) -> tuple[str, str]:
    """Opens and closes at random; the answer closes whatever is still open."""
    closing = {"(": ")", "[": "]", "{": "}"}
    text = ""
    open_brackets: list[str] = []
    length = rng.randint(*BRACKET_LENGTHS)
    while len(text) < length or not open_brackets:
        if open_brackets and rng.random() < 0.4:
            text += closing[open_brackets.pop()]
        else:
            open_brackets.append(rng.choice("([{"))
            text += open_brackets[-1]
    return f"B {text}=", "".join(closing[b] for b in reversed(open_brackets))


def _addition(rng: random.Random) -> tuple[str, str]:
    """Two numbers whose digits never sum to more than nine: `A 42+35=77`."""
    sums = [rng.randrange(10) for _ in range(ADDEND_DIGITS)]
    first = [rng.randint(0, total) for total in sums]
    second = [total - digit for total, digit in zip(sums, first, strict=True)]
    text = lambda digits: "".join(map(str, digits))  # noqa: E731
    return f"A {text(first)}+{text(second)}=", text(sums)


def _recall(rng: random.Random) -> tuple[str, str]:
    """Pairs of key and value, then every key once more: `K a3f7=fa;` and `f7a3`."""
    keys = rng.sample(RECALL_KEYS, rng.randint(*RECALL_PAIRS))
    value = dict(zip(keys, rng.choices(RECALL_VALUES, k=len(keys)), strict=True))
    asked = rng.sample(keys, len(keys))
    text = lambda order: "".join(key + value[key] for key in order)  # noqa: E731
    return f"K {text(keys)}={''.join(asked)};", text(asked)


def _story(rng: random.Random) -> tuple[str, str]:
    """One sentence, and a question after one of its three words."""
    name, thing, place = rng.choice(NAMES), rng.choice(THINGS), rng.choice(PLACES)
    question, answer = rng.choice((("who", name), ("what", thing), ("where", place)))
    return f"T {name} left a {thing} in the {place}. {question}?", answer


@dataclasses.dataclass(frozen=True)
class Task:
    """A maker of (prompt, answer) and its share of the examples."""

    make: Callable[[random.Random], tuple[str, str]]
    share: float


TASKS = {
    "copy": Task(_copy, 1.0),
    "reverse": Task(_reverse, 1.0),
    "sort": Task(_sort, 1.0),
    "brackets": Task(_brackets, 1.0),
    "addition": Task(_addition, 2.0),
    "recall": Task(_recall, 2.0),
    "story": Task(_story, 1.0),
}
TASK_NAMES = tuple(TASKS)
TASK_SHARES = tuple(task.share for task in TASKS.values())
