"""What each verb of the command line does: call the library, print what comes back."""

import dataclasses
import functools
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import tqdm
from absl import logging
from flax import nnx

from gemmaqat import config as configs
from gemmaqat import generation
from gemmaqat.compare import check as check_comparison
from gemmaqat.compare import compare as run_comparison
from gemmaqat.compare import evaluate as run_evaluation
from gemmaqat.config import Experiment
from gemmaqat.data.chat import ChatTemplate
from gemmaqat.data.tokenizer import (
    Tokenizer,
    check_vocabulary,
    load_tokenizer,
    make_tokenizer,
)
from gemmaqat.evaluation import context
from gemmaqat.evaluation.evaluate import FOLDER
from gemmaqat.evaluation.plots import perplexity_by_cache
from gemmaqat.interop.load import read_config, read_pretrained
from gemmaqat.interop.packed_folder import save_packed
from gemmaqat.kernels import dispatch
from gemmaqat.models.config import ModelConfig
from gemmaqat.models.sizes import model_config
from gemmaqat.planning.devices import format_bytes, free_bytes, parse_bytes
from gemmaqat.planning.layouts import DEVICE_FORMATS, LAYOUTS
from gemmaqat.planning.parameters import abstract_model
from gemmaqat.planning.report import plan_comparison, plan_training
from gemmaqat.planning.size import fit, survey
from gemmaqat.planning.size_report import draw_fits, render, render_fits
from gemmaqat.quantization.activations import prepare, without_activations
from gemmaqat.quantization.convert import convert, dequantize_params
from gemmaqat.quantization.rules import resolve
from gemmaqat.quantization.table import Table
from gemmaqat.training.calibration import calibrated
from gemmaqat.training.loop import train as run_training
from gemmaqat.training.start import LoadedRun, keep_base, load_run
from gemmaqat.training.workdir import versions


def train(options: Any) -> None:
    """Trains one model: float, QAT or distilled QAT."""
    experiment = _experiment(options)
    if options.dry_run:
        config = _model_config(experiment)
        if experiment.train.method != "none":
            print(_resolve(experiment, config).render())
        print(plan_training(experiment, config).render())
        return
    result = run_training(experiment, _workdir(options), progress=_progress())
    last: dict[str, Any] = {}
    for record in result.history:
        last |= record
    numbers = ", ".join(f"{name} {x:.4g}" for name, x in last.items() if "loss" in name)
    print(f"{result.steps} steps done in {options.workdir}: {numbers}")


def compare(options: Any) -> None:
    """Gives every size, recipe and seed the same arms and judges them alike."""
    experiment = _experiment(options)
    if not options.dry_run:
        print(run_comparison(experiment, _workdir(options), progress=_progress()))
        return
    check_comparison(experiment)
    for plan in plan_comparison(experiment):
        for recipe in experiment.compare.recipes:
            table = _resolve(experiment, plan.config, recipe=recipe)
            print(f"{plan.config.name}, {recipe}: {table.bits_per_weight():.3f} bits per weight")
        print(plan.render())


def evaluate(options: Any) -> None:
    """Judges a checkpoint on the hold-out, in float and quantized."""
    experiment = _experiment(options)
    model, table = None, None
    if options.checkpoint:
        loaded = _load(Path(options.checkpoint), experiment)
        model, table = loaded.model, loaded.table
    scores = run_evaluation(experiment, _workdir(options), model=model, table=table)
    print(_columns({name: score.metrics for name, score in scores.items()}))
    if experiment.evaluation.kv_caches:
        folder = _workdir(options) / FOLDER / list(scores)[-1]
        caches = context.load(folder)
        perplexity_by_cache(caches).savefig(folder / "context.png", dpi=150)
        print(f"\n{folder.name}, perplexity by position and cache ({folder / 'context.png'}):\n")
        print(context.render(caches, samples=experiment.evaluation.bootstrap_samples))


def quantize(options: Any) -> None:
    """Rounds a checkpoint to its table, or the config's recipe, and writes packed weights."""
    experiment = _experiment(options)
    source = Path(_required(options, "checkpoint", experiment.model.checkpoint))
    output = _workdir(options)
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"--workdir={output}: not empty; choose a new folder for packed weights.")
    loaded = _load(source, experiment)
    if not _is_run(source) and loaded.table is not None:
        raise ValueError(
            f"{source}: quantized already ({loaded.table.recipe or 'codes of its own'}); write it "
            "in another form with `gemmaqat export`, or give the float checkpoint it came from."
        )
    table = _resolve(experiment, loaded.model.config)
    if _is_run(source) and loaded.table is not None and (differences := loaded.table.diff(table)):
        raise ValueError(
            f"{source}: trained for another quantization table than the config's "
            f"({'; '.join(differences[:3])}); leave --config out to use its own."
        )
    graphdef, params = nnx.split(loaded.model)
    model = prepare(nnx.merge(graphdef, dequantize_params(params)), table)
    if table.activations:
        if table.calibrated:
            check_vocabulary(make_tokenizer(experiment.data), model.config.vocab_size)
        graphdef, params = nnx.split(model)
        model = nnx.merge(graphdef, calibrated(graphdef, params, table, experiment))
    packed = convert(model, table)
    save_packed(packed, output, table=table)
    keep_base(source, output)
    if _is_run(source):  # its data config is what makes the tokenizer
        (output / "experiment.json").write_bytes((source / "config.json").read_bytes())
    print(table.render())
    print(f"wrote {output}: {format_bytes(table.num_bytes)}")


def generate(options: Any) -> None:
    """Continues prompts with a checkpoint, float or packed."""
    source = Path(_required(options, "checkpoint", options.workdir))
    _check_folder(source)
    if not options.prompt:
        raise ValueError('--prompt: missing; give at least one, as in --prompt="Once upon a time".')
    tokenizer = _find_tokenizer(options.tokenizer, source)
    prompts = options.prompt
    if options.chat:
        template = ChatTemplate.find(str(source))
        prompts = [
            template.render([{"role": "user", "content": text}], add_generation_prompt=True)
            for text in prompts
        ]
    model = _load(source, dtype=options.dtype).model
    if _is_run(source):  # its weights are the float masters, not what would be shipped
        if options.kv_cache == "static":
            raise ValueError(
                f"--kv_cache=static: {source} is a run, whose model is tried in float; give a "
                "folder that `gemmaqat quantize` made of it, or --kv_cache=int8."
            )
        model = without_activations(model)
    streamed = len(prompts) == 1
    result = generation.generate(
        model,
        prompts,
        tokenizer=tokenizer,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        kv_cache=options.kv_cache or None,
        on_token=(lambda index, token, text: print(text, end="", flush=True)) if streamed else None,
    )
    if streamed:
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
    experiment = _experiment(options)
    print(plan_training(experiment, _model_config(experiment)).render())


def size(options: Any) -> None:
    """Prints exact bytes of sizes and formats, and what fits a device; allocates nothing."""
    memory = parse_bytes(options.memory, where="--memory") if options.memory else None
    bandwidth = parse_bytes(options.bandwidth, where="--bandwidth") if options.bandwidth else None
    if memory is None and (bandwidth or options.plot):
        raise ValueError("--memory: missing; --bandwidth and --plot ask what fits in how much.")
    measured = survey(
        _names(options.size),
        _names(options.format),
        default=DEVICE_FORMATS if memory else tuple(LAYOUTS),
        contexts=_counts(options.context, "--context") or ((4_096, 32_768) if memory else (0,)),
        kv_cache=options.kv_cache,
    )
    if memory is None:
        print(_json_text([one.to_json() for one in measured]) if options.json else render(measured))
        return
    fits = [fit(one, memory=memory, bandwidth=bandwidth) for one in measured]
    if options.json:
        print(_json_text([one.to_json() for one in fits]))
    else:
        print(render_fits(fits, memory=memory))
    if options.plot:
        draw_fits(fits, memory=memory, bandwidth=bandwidth).savefig(options.plot, dpi=150)


def doctor(options: Any) -> None:
    """Prints versions, devices, kernels, memory and caches: the start of a problem report."""
    print(f"python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} CPUs")
    for name, version in versions().items():
        print(f"{name} {version}")
    for device in jax.devices():
        free = free_bytes(device)
        memory = "unknown" if free is None else format_bytes(free)
        print(f"device {device.id}: {device.platform} {device.device_kind}, free memory {memory}")
    print(f"kernels: {dispatch.explain()}")
    print(f"compilation cache: {jax.config.values['jax_compilation_cache_dir'] or 'off'}")


def _experiment(options: Any) -> Experiment:
    """The config of --config, or else that of the run named by --checkpoint or --workdir."""
    if options.config is not None:
        tiny = "tiny" in options and options.tiny
        return configs.parse(configs.tiny(options.config) if tiny else options.config)
    for flag in ("checkpoint", "workdir"):
        folder = Path(options[flag].value or "") if flag in options else Path()
        if (folder / "run.json").is_file():
            return configs.load(folder / "config.json")
    raise ValueError(
        "--config: missing; give an experiment file, as in --config=experiments/quickstart.py."
    )


def _required(options: Any, flag: str, default: str) -> str:
    value = options[flag].value or default
    if not value:
        raise ValueError(
            f"--{flag}: missing; name a Hugging Face folder, a work directory of a training, or "
            "(to generate) a folder that `gemmaqat quantize` wrote."
        )
    return value


def _workdir(options: Any) -> Path:
    if not options.workdir:
        raise ValueError("--workdir: missing; name the directory to write, as in --workdir=runs/a.")
    path = Path(options.workdir)
    if path.exists() and not path.is_dir():
        raise ValueError(f"--workdir={path}: is a file; name a directory.")
    return path


def _model_config(experiment: Experiment) -> ModelConfig:
    """The model's configuration without loading it."""
    section = experiment.model
    precision: dict[str, Any] = dict(
        dtype=section.dtype, param_dtype=section.param_dtype, remat=section.remat
    )
    folder = Path(section.checkpoint)
    if section.checkpoint and folder.exists() and not _is_run(folder):
        return dataclasses.replace(read_config(folder), **precision)
    if section.checkpoint and not folder.exists():
        logging.info("%s: no such folder; shapes are those of %s", folder, section.name)
    return model_config(section.name, **precision)


def _resolve(experiment: Experiment, config: ModelConfig, *, recipe: str = "") -> Table:
    """The quantization table of a model that exists as shapes only."""
    section = experiment.quantization
    return resolve(
        recipe or section.recipe,
        abstract_model(config),
        rules=section.rules,
        calibration=section.calibration_method,
    )


def _load(
    folder: Path, experiment: Experiment | None = None, *, dtype: str = "float32"
) -> LoadedRun:
    """Model, and table where it has one, of a work directory or a checkpoint of any format."""
    _check_folder(folder)
    precision: dict[str, Any] = dict(dtype=dtype, param_dtype=dtype)
    if experiment is not None:
        precision = dict(dtype=experiment.model.dtype, param_dtype=experiment.model.param_dtype)
    if _is_run(folder):
        return load_run(folder, **precision)
    loaded = read_pretrained(folder, **precision)
    return LoadedRun(model=loaded.model, table=loaded.table, step=0)


def _check_folder(folder: Path) -> None:
    """Refuses a folder that cannot hold one model."""
    if not folder.exists():
        raise FileNotFoundError(f"--checkpoint={folder}: no such folder or file.")
    if (folder / "run.json").is_file() and not _is_run(folder):
        runs = sorted(path.parent for path in folder.rglob("checkpoints"))
        hint = (
            f"name one of its runs, such as {runs[0]}." if runs else "no model is saved there yet."
        )
        raise ValueError(f"{folder}: a comparison or an unfinished run, not one model; {hint}")


def _is_run(folder: Path) -> bool:
    return (folder / "checkpoints").is_dir()


def _find_tokenizer(given: str, source: Path) -> Tokenizer:
    """The named tokenizer, that of the data the model was trained on, or the checkpoint's own."""
    if given:
        return load_tokenizer(given)
    experiment = source / ("config.json" if _is_run(source) else "experiment.json")
    if experiment.is_file():
        return make_tokenizer(configs.load(experiment).data)
    return load_tokenizer(source)


def _names(text: str) -> tuple[str, ...]:
    """The words of a comma-separated list."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _counts(text: str, flag: str) -> tuple[int, ...]:
    words = _names(text)
    if any(not word.isdecimal() for word in words):
        raise ValueError(f"{flag}={text}: expected whole numbers, as in {flag}=4096,32768.")
    return tuple(int(word) for word in words)


def _json_text(value: Any) -> str:
    return json.dumps(value, indent=2)


def _columns(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """One row per metric, one column per model."""
    names = dict.fromkeys(key for column in metrics.values() for key in column)
    width = max(map(len, names))
    lines = [" " * width + "".join(f"  {title:>14}" for title in metrics)]
    for name in names:
        cells = (column.get(name, float("nan")) for column in metrics.values())
        lines.append(f"{name:<{width}}" + "".join(f"  {value:>14.6g}" for value in cells))
    return "\n".join(lines)


def _progress() -> Callable[..., Any] | None:
    """Bars at a terminal; None lets the library log plain lines every few seconds."""
    if not sys.stderr.isatty():
        return None
    return functools.partial(tqdm.tqdm, dynamic_ncols=True, file=sys.stderr)
