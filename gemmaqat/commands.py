"""What each verb of the command line does: call the library, print what comes back.

What starts JAX is imported inside the functions, so that help and mistakes answer at once.
"""

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import logging

from gemmaqat import config as configs
from gemmaqat.config import Experiment

_COMPANIONS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip


def train(options: Any) -> None:
    """Trains one model: float, QAT or distilled QAT."""
    experiment = _experiment(options)
    if options.dry_run:
        from gemmaqat.planning.report import plan_training

        config = _model_config(experiment)
        if experiment.train.method != "none":
            print(_resolve(experiment, config).render())
        print(plan_training(experiment, config).render())
        return
    from gemmaqat.training import loop

    result = loop.train(experiment, _workdir(options), progress=_progress())
    last = result.history[-1] if result.history else {}
    numbers = ", ".join(f"{k}={v:.4g}" for k, v in last.items() if isinstance(v, float))
    print(f"{result.steps} steps done in {options.workdir}: {numbers}")


def compare(options: Any) -> None:
    """Gives every size, recipe and seed the same arms and judges them alike."""
    experiment = _experiment(options)
    if options.dry_run:
        from gemmaqat.planning.report import plan_comparison

        for plan in plan_comparison(experiment):
            for recipe in experiment.compare.recipes:
                table = _resolve(experiment, plan.config, recipe=recipe)
                print(
                    f"{plan.config.name}, {recipe}: {table.bits_per_weight():.3f} bits per weight"
                )
            print(plan.render())
        return
    from gemmaqat import compare as comparison

    print(comparison.compare(experiment, _workdir(options), progress=_progress()))


def evaluate(options: Any) -> None:
    """Judges a checkpoint on the hold-out, in float and quantized by the config's recipe."""
    from flax import nnx

    from gemmaqat.evaluation.evaluate import FOLDER, Evaluator

    experiment = _experiment(options)
    source = options.checkpoint or experiment.model.checkpoint or options.workdir
    if not source:
        raise ValueError(
            "--checkpoint: missing; name a Hugging Face folder or a work directory of a training."
        )
    model = _load_model(source, experiment)
    graphdef, params = nnx.split(model)
    recipe = experiment.quantization.recipe
    evaluator = Evaluator(graphdef, experiment, references=("float",))
    references = [evaluator.reference("float", params)]
    arms = {"float": None}
    if recipe != "none":
        arms[recipe] = _resolve(experiment, model.config)
    scores = {}
    for name, table in arms.items():
        scores[name] = evaluator.score(params, table, references=references)
        if options.workdir:
            scores[name].save(Path(options.workdir) / FOLDER / name)
    print(_columns({name: score.metrics for name, score in scores.items()}))


def quantize(options: Any) -> None:
    """Rounds a checkpoint to the config's recipe and writes packed weights."""
    from gemmaqat.interop.packed_folder import save_packed
    from gemmaqat.packed import PackedTensor
    from gemmaqat.quantization.convert import convert

    experiment = _experiment(options)
    source = options.checkpoint or experiment.model.checkpoint
    if not source:
        raise ValueError(
            "--checkpoint: missing; name a Hugging Face folder or a work directory of a training."
        )
    output = _workdir(options)
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"--workdir={output}: not empty; choose a new folder for packed weights.")
    model = _load_model(source, experiment)
    table = _resolve(experiment, model.config)
    packed = convert(model, table)
    save_packed(packed, output, table=table)
    _copy_companions(Path(source), output)
    print(table.render())
    print(f"wrote {output}: {_packed_bytes(packed, PackedTensor)}")


def generate(options: Any) -> None:
    """Continues prompts with a checkpoint, float or packed."""
    from gemmaqat import generation

    source = options.checkpoint or options.workdir
    if not source:
        raise ValueError(
            "--checkpoint: missing; name a Hugging Face folder, a work directory, or a folder "
            "that `gemmaqat quantize` wrote."
        )
    if not options.prompt:
        raise ValueError('--prompt: missing; give at least one, as in --prompt="Once upon a time".')
    tokenizer = _find_tokenizer(options.tokenizer, Path(source))
    model = _load_model(source, None, dtype=options.dtype)
    prompts = options.prompt
    if options.chat:
        from gemmaqat.data.chat import ChatTemplate

        template = ChatTemplate.find(source)
        prompts = [
            template.render([{"role": "user", "content": text}], add_generation_prompt=True)
            for text in prompts
        ]
    single = len(prompts) == 1

    def show(index: int, token: int, text: str) -> None:
        print(text, end="", flush=True)

    result = generation.generate(
        model,
        prompts,
        tokenizer=tokenizer,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        stop_ids=_stop_ids(Path(source), tokenizer),
        on_token=show if single else None,
    )
    if single:
        print()
    else:
        for prompt, text in zip(options.prompt, result.texts, strict=True):
            print(f"--- {prompt}\n{text}")
    logging.info(
        "prefill %.2f s, %.1f tokens/s (compilation included)",
        result.prefill_seconds,
        result.tokens_per_second,
    )


def inspect(options: Any) -> None:
    """Prints what happens to every parameter; allocates nothing."""
    experiment = _experiment(options)
    print(_resolve(experiment, _model_config(experiment)).render())


def plan(options: Any) -> None:
    """Prints parameters, memory and a rough time of a training; allocates nothing."""
    from gemmaqat.planning.report import plan_training

    experiment = _experiment(options)
    print(plan_training(experiment, _model_config(experiment)).render())


def doctor(options: Any) -> None:
    """Prints versions, devices, kernels, memory and caches: the start of a problem report."""
    import platform

    import jax

    from gemmaqat.kernels import dispatch
    from gemmaqat.planning.devices import format_bytes, free_bytes
    from gemmaqat.training.workdir import versions

    print(f"python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} CPUs")
    for name, version in versions().items():
        print(f"{name} {version}")
    for device in jax.devices():
        free = free_bytes(device)
        memory = "unknown" if free is None else format_bytes(free)
        print(f"device {device.id}: {device.platform} {device.device_kind}, free memory {memory}")
    print(f"kernels: {dispatch.explain()}")
    cache = jax.config.values["jax_compilation_cache_dir"]
    print(f"compilation cache: {cache or 'off'}")


def _experiment(options: Any) -> Experiment:
    """The parsed config of --config, or else the one that the work directory holds."""
    if options.config is not None:
        return configs.parse(
            configs.tiny(options.config) if _given(options, "tiny") else options.config
        )
    if _given(options, "workdir") and (Path(options.workdir) / "config.json").is_file():
        return configs.load(Path(options.workdir) / "config.json")
    raise ValueError(
        "--config: missing; give an experiment file, as in --config=experiments/quickstart.py."
    )


def _given(options: Any, name: str) -> Any:
    return options[name].value if name in options else None


def _workdir(options: Any) -> Path:
    if not options.workdir:
        raise ValueError("--workdir: missing; name the directory to write, as in --workdir=runs/a.")
    path = Path(options.workdir)
    if path.exists() and not path.is_dir():
        raise ValueError(f"--workdir={path}: is a file; name a directory.")
    return path


def _model_config(experiment: Experiment) -> Any:
    """The model's configuration without loading it."""
    from gemmaqat.interop.hf import read_config
    from gemmaqat.models.sizes import model_config

    section = experiment.model
    precision: dict[str, Any] = dict(
        dtype=section.dtype, param_dtype=section.param_dtype, remat=section.remat
    )
    if section.checkpoint and not (Path(section.checkpoint) / "checkpoints").is_dir():
        return dataclasses.replace(read_config(section.checkpoint), **precision)
    return model_config(section.name, **precision)


def _resolve(experiment: Experiment, config: Any, *, recipe: str = "") -> Any:
    """The quantization table of a model that exists as shapes only."""
    from gemmaqat.planning.parameters import abstract_model
    from gemmaqat.quantization.rules import resolve

    section = experiment.quantization
    return resolve(recipe or section.recipe, abstract_model(config), rules=section.rules)


def _load_model(source: str, experiment: Experiment | None, *, dtype: str = "float32") -> Any:
    """The model of a packed folder, a work directory or a Hugging Face folder."""
    from gemmaqat.interop.hf import load_pretrained
    from gemmaqat.interop.packed_folder import is_packed_folder, load_packed
    from gemmaqat.training import start

    folder = Path(source)
    if is_packed_folder(folder):
        if experiment is not None:
            raise ValueError(
                f"{folder}: quantized already; give the float checkpoint it came from."
            )
        return load_packed(folder, dtype=dtype)
    precision: dict[str, Any] = dict(dtype=dtype, param_dtype=dtype)
    if experiment is not None:
        precision = dict(dtype=experiment.model.dtype, param_dtype=experiment.model.param_dtype)
    if (folder / "checkpoints").is_dir():
        return start.load_run(folder, **precision).model
    return load_pretrained(folder, **precision)


def _copy_companions(source: Path, output: Path) -> None:
    """What generation needs beside the weights: the tokenizer, or the data config that makes it."""
    for name in _COMPANIONS:
        if (source / name).is_file():
            (output / name).write_bytes((source / name).read_bytes())
    if (source / "checkpoints").is_dir():
        (output / "experiment.json").write_bytes((source / "config.json").read_bytes())


def _find_tokenizer(given: str, source: Path) -> Any:
    """The named tokenizer, the checkpoint's own file, or that of the data it was trained on."""
    from gemmaqat.data.tokenizer import load_tokenizer

    if given:
        return load_tokenizer(given)
    experiment = source / (
        "config.json" if (source / "checkpoints").is_dir() else "experiment.json"
    )
    if experiment.is_file():
        from gemmaqat.data.tokenizer import make_tokenizer

        return make_tokenizer(configs.load(experiment).data)
    return load_tokenizer(source)


def _stop_ids(source: Path, tokenizer: Any) -> list[int]:
    """Ends of text and of turn that the checkpoint names, and the tokenizer's own."""
    path = source / "generation_config.json"
    named = json.loads(path.read_text()).get("eos_token_id", []) if path.is_file() else []
    return sorted({tokenizer.eos_id, *(named if isinstance(named, list) else [named])})


def _columns(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """One row per metric, one column per model."""
    names = dict.fromkeys(key for column in metrics.values() for key in column)
    width = max(map(len, names))
    lines = [" " * width + "".join(f"  {title:>14}" for title in metrics)]
    for name in names:
        cells = (column.get(name, float("nan")) for column in metrics.values())
        lines.append(f"{name:<{width}}" + "".join(f"  {value:>14.6g}" for value in cells))
    return "\n".join(lines)


def _packed_bytes(model: Any, kind: type) -> str:
    import jax

    from gemmaqat.planning.devices import format_bytes

    leaves = jax.tree.leaves(model, is_leaf=lambda leaf: isinstance(leaf, kind))
    return format_bytes(sum(leaf.nbytes for leaf in leaves))


def _progress() -> Callable[..., Any] | None:
    """Bars at a terminal; None lets the library log plain lines every few seconds."""
    if not sys.stderr.isatty():
        return None
    import tqdm

    return functools.partial(tqdm.tqdm, dynamic_ncols=True, file=sys.stderr)
