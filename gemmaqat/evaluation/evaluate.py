"""Scores of one model on the fixed hold-out, kept per sequence so that models can be paired.

All models of one structure, float or quantized, go through one compiled program. It takes float
weights: those of a quantized model are its codes times its scales.

Two sets of tokens are told apart. *Answer* tokens have loss weight 1: the answers of the task
language and of chats, every token of plain text. *All* tokens have any loss weight. The
perplexity of answers is the main one: the task language's prompts are random letters, whose
entropy no model can reduce and which would bury what quantization does to the answers.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from gemmaqat.config import Experiment
from gemmaqat.data.loader import holdout
from gemmaqat.data.packing import Batch
from gemmaqat.data.tokenizer import make_tokenizer
from gemmaqat.evaluation import tasks
from gemmaqat.evaluation.metrics import TokenMetrics, token_comparison
from gemmaqat.evaluation.statistics import Sums
from gemmaqat.json_file import read_json
from gemmaqat.packed import PackedTensor
from gemmaqat.quantization import trees
from gemmaqat.quantization.activations import without_activations
from gemmaqat.quantization.convert import convert_params, dequantize_params, is_packed
from gemmaqat.quantization.rules import Table
from gemmaqat.typing import Params

FORMAT_VERSION = 1
FOLDER = "evaluation"  # in the work directory of the model
METRICS, SEQUENCES, ITEMS = "metrics.json", "sequences.jsonl", "items.jsonl"
TOKEN_SETS = ("answer", "all")
MAIN = "answer"
UNCLAMPED = "unclamped_"  # prefix of what a model does without the clamps of its activations

_INPUTS = ("tokens", "targets", "segment_ids", "positions")


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a model did on the hold-out.

    The clamp of quantized activations is part of the model. Where there is one, all numbers are
    taken once more without it, and their names start with `unclamped_`.

    Attributes:
        sequences: columns over the `N` sequences. For each token set (`answer`, `all`):
            `<set>_tokens`, and the sums `<set>_nll`, `<set>_correct`, and for each reference
            `<set>_kl_to_<reference>` and `<set>_agreement_with_<reference>`.
        items: the task of every item.
        matches: whether the item was solved.
        metrics: flat name to number; what `sequences` and `items` come to, plus `bytes` and
            `bits_per_weight`.
        contents_sha256: of the codes, scales and kept floats that were judged, where it is known;
            a certificate of an export names the evaluation of exactly its contents.
        layer_errors: path of a quantized weight to |quantized - master| / |master| (Frobenius).
    """

    sequences: dict[str, np.ndarray]
    items: tuple[str, ...]
    matches: np.ndarray
    metrics: dict[str, float]
    layer_errors: dict[str, float]
    contents_sha256: str = ""

    def sums(self, quantity: str, *, tokens: str = MAIN) -> Sums:
        """One quantity summed per sequence over one set of tokens: `nll`, `kl_to_base`, ..."""
        return Sums(self.sequences[f"{tokens}_{quantity}"], self.sequences[f"{tokens}_tokens"])

    def save(self, folder: Path) -> None:
        """Writes metrics.json, sequences.jsonl and items.jsonl; metrics.json is the last."""
        folder.mkdir(parents=True, exist_ok=True)
        columns = {name: column.tolist() for name, column in self.sequences.items()}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        _write_lines(folder / SEQUENCES, rows)
        solved = zip(self.items, self.matches.tolist(), strict=True)
        _write_lines(folder / ITEMS, [dict(task=task, solved=match) for task, match in solved])
        text = json.dumps(
            dict(
                format_version=FORMAT_VERSION,
                metrics=self.metrics,
                layer_errors=self.layer_errors,
                contents_sha256=self.contents_sha256,
            ),
            indent=1,
        )
        # Renamed into place: a folder with a metrics.json holds a whole evaluation.
        temporary = folder / f".{METRICS}.tmp"
        temporary.write_text(text + "\n")
        temporary.replace(folder / METRICS)

    @classmethod
    def load(cls, folder: Path) -> "Scores":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is no finished evaluation.
            ValueError: it is of another format version.
        """
        path = folder / METRICS
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no finished evaluation; run the comparison again.")
        saved = read_json(path, "restore it from a copy")
        if saved["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"{path}: format_version is {saved['format_version']!r}, this version reads "
                f"{FORMAT_VERSION}; use the version of gemmaqat that wrote it."
            )
        rows, items = _read_lines(folder / SEQUENCES), _read_lines(folder / ITEMS)
        return cls(
            sequences={name: np.asarray([row[name] for row in rows]) for name in rows[0]},
            items=tuple(item["task"] for item in items),
            matches=np.asarray([item["solved"] for item in items], bool),
            metrics=saved["metrics"],
            layer_errors=saved["layer_errors"],
            contents_sha256=saved.get("contents_sha256", ""),
        )


@dataclasses.dataclass(frozen=True)
class Reference:
    """A model to compare with: its weights, and its hidden states for every batch."""

    name: str
    weights: Params
    hidden: Sequence[Array]


class Evaluator:
    """The hold-out, and the one compiled program that judges every model of a structure."""

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        experiment: Experiment,
        *,
        references: Sequence[str] = (),
    ) -> None:
        """Reads the hold-out; nothing is compiled before the first model comes.

        Args:
            graphdef: structure of the models.
            experiment: its sections data and evaluation are used.
            references: names of the models to compare with, given later in this order.

        Raises:
            ValueError: the data have no hold-out.
        """
        settings = experiment.evaluation
        tokenizer = make_tokenizer(experiment.data)
        data = dataclasses.replace(experiment.data, batch_size=settings.batch_size)
        self.holdout = holdout(data, num_sequences=settings.num_sequences, tokenizer=tokenizer)
        if not self.holdout:
            raise ValueError(
                "config.data: the hold-out is empty; give data.holdout_files, or more data."
            )
        self.tasks = tasks.make_task_set(experiment, tokenizer)
        self.reference_names = tuple(references)

        def program(
            weights: Params,
            references: tuple[tuple[Params, Array], ...],
            batch: dict[str, Array],
        ) -> tuple[TokenMetrics, Array]:
            model = nnx.merge(graphdef, weights)
            hidden = _hidden(model, batch)
            found = token_comparison(
                model.head,
                hidden,
                batch["targets"],
                [(nnx.merge(graphdef, other).head, states) for other, states in references],
                chunk_tokens=settings.chunk_tokens,
            )
            return found, hidden

        self._program = jax.jit(program)
        self._hidden_shape = lambda weights, batch: jax.eval_shape(
            lambda weights, batch: _hidden(nnx.merge(graphdef, weights), batch), weights, batch
        )

    def reference(self, name: str, weights: Params) -> Reference:
        """Prepares a model to compare with: its hidden states are computed once, for all arms."""
        batches = [*self.holdout, *self.tasks.batches]
        shape = self._hidden_shape(weights, _inputs(batches[0]))
        # The same program as for an arm, so that nothing more is compiled; it compares with
        # placeholders and only the hidden states are kept.
        weights, zeros = _commit((weights, jnp.zeros(shape.shape, shape.dtype)))
        blank = ((weights, zeros),) * len(self.reference_names)
        hidden = [self._program(weights, blank, _inputs(batch))[1] for batch in batches]
        return Reference(name, weights, hidden)

    def score(
        self,
        params: Params,
        table: Table | None = None,
        *,
        references: Sequence[Reference] = (),
    ) -> Scores:
        """Converts float parameters as the table says, and judges what would be shipped.

        Args:
            params: float master parameters, or packed ones, which are judged by their codes; of a
                prepared model, with the scales of its activations where the table quantizes them.
            table: the resolved quantization; None leaves them in float.
            references: prepared by `reference`, in the order of `reference_names`.
        """
        assert tuple(r.name for r in references) == self.reference_names
        converted = params
        if table is not None and not is_packed(params):
            converted = convert_params(params, table)
        weights = _commit(params if table is None else dequantize_params(converted))
        sequences, matches, metrics = self._judge(weights, references)
        if table is not None and table.activations:
            others, _, other_metrics = self._judge(without_activations(weights), references)
            sequences |= {UNCLAMPED + name: column for name, column in others.items()}
            metrics |= {UNCLAMPED + name: value for name, value in other_metrics.items()}
        return Scores(
            sequences=sequences,
            items=tuple(item.task for item in self.tasks.items),
            matches=matches,
            metrics=metrics | _storage(converted, table),
            layer_errors={} if table is None else _layer_errors(params, converted),
        )

    def _judge(
        self, weights: Params, references: Sequence[Reference]
    ) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, float]]:
        """`Scores.sequences`, `Scores.matches` and their metrics, of weights as they are."""
        found = []
        for index, batch in enumerate([*self.holdout, *self.tasks.batches]):
            compared = tuple((r.weights, r.hidden[index]) for r in references)
            found.append(jax.device_get(self._program(weights, compared, _inputs(batch))[0]))
        on_holdout, on_tasks = found[: len(self.holdout)], found[len(self.holdout) :]
        sequences = _sum_sequences(on_holdout, self.holdout, self.reference_names)
        matches = tasks.exact_matches(
            [metrics.correct for metrics in on_tasks], self.tasks.batches, len(self.tasks.items)
        )
        metrics = _token_means(sequences, self.reference_names)
        return sequences, matches, metrics | tasks.accuracies(self.tasks.items, matches)


def _hidden(model: Any, batch: dict[str, Array]) -> Array:
    return model(
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        logits="none",
    ).hidden


def _commit(arrays: Any) -> Any:
    """Binds arrays to where they are; JAX compiles anew for arrays that are not bound."""
    return jax.tree.map(lambda array: jax.device_put(array, array.sharding), arrays)


def _inputs(batch: Batch) -> Batch:
    return {name: batch[name] for name in _INPUTS}


def _sum_sequences(
    found: Sequence[TokenMetrics], batches: Sequence[Batch], references: Sequence[str]
) -> dict[str, np.ndarray]:
    """Columns of `Scores.sequences`; float64 sums, rows without any token left out."""
    weights = np.concatenate([batch["loss_weights"] for batch in batches])
    used = np.any(weights > 0, axis=1)
    stack = lambda field: np.concatenate([getattr(m, field) for m in found])[used]  # noqa: E731
    quantities = {"nll": stack("nll"), "correct": stack("correct")}
    for index, name in enumerate(references):
        quantities[f"kl_to_{name}"] = stack("kl")[..., index]
        quantities[f"agreement_with_{name}"] = stack("agree")[..., index]
    masks = {"answer": weights[used] >= 1, "all": weights[used] > 0}
    columns: dict[str, np.ndarray] = {}
    for token_set in TOKEN_SETS:
        mask = masks[token_set]
        columns[f"{token_set}_tokens"] = np.asarray(np.sum(mask, axis=1), np.float64)
        for name, values in quantities.items():
            kept = np.where(mask, values, 0.0).astype(np.float64)
            columns[f"{token_set}_{name}"] = np.asarray(np.sum(kept, axis=1))
    return columns


def _token_means(sequences: dict[str, np.ndarray], references: Sequence[str]) -> dict[str, float]:
    metrics = {}
    for token_set in TOKEN_SETS:
        tokens = np.sum(sequences[f"{token_set}_tokens"])
        mean = lambda name: float(np.sum(sequences[f"{token_set}_{name}"]) / tokens)  # noqa: B023, E731
        metrics[f"{token_set}_perplexity"] = float(np.exp(mean("nll")))
        metrics[f"{token_set}_accuracy"] = mean("correct")
        for name in references:
            for quantity in (f"kl_to_{name}", f"agreement_with_{name}"):
                metrics[f"{token_set}_{quantity}"] = mean(quantity)
    return metrics


def _storage(converted: Params, table: Table | None) -> dict[str, float]:
    """Bytes of all parameters as they are stored, and the same in bits per parameter.

    Of the scales of activations, those that the table stores count as bytes: see `Table`.
    """
    leaves = [
        leaf
        for leaf, metadata in trees.weights(converted).values()
        if not trees.is_activation_scale(metadata)
    ]
    total = sum(leaf.nbytes for leaf in leaves) + (table.activation_bytes if table else 0)
    return {"bytes": float(total), "bits_per_weight": 8 * total / sum(leaf.size for leaf in leaves)}


def _layer_errors(params: Params, converted: Params) -> dict[str, float]:
    """Relative RMS error of each packed weight against its own float master."""
    masters, errors = trees.weights(params), {}
    for path, (leaf, _) in trees.weights(converted).items():
        master = masters[path][0]
        if isinstance(leaf, PackedTensor) and not isinstance(master, PackedTensor):
            difference = leaf.dequantize() - master
            errors[path.removesuffix("/weight")] = float(
                jnp.linalg.norm(difference.ravel()) / jnp.linalg.norm(master.ravel())
            )
    return errors


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
