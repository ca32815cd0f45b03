"""The verbs that deal with deployed files: `export` and `verify`."""

import dataclasses
import difflib
import hashlib
import json
from pathlib import Path
from typing import Any

from absl import logging

from gemmaqat import commands
from gemmaqat import config as configs
from gemmaqat.config import Experiment, ExportConfig
from gemmaqat.evaluation.evaluate import FOLDER, METRICS
from gemmaqat.interop.base import FOLDER as BASE
from gemmaqat.interop.base import read_base
from gemmaqat.interop.export import check_target, shipment_of
from gemmaqat.interop.export import export as run_export
from gemmaqat.interop.formats import detect, find_format
from gemmaqat.interop.options import ExportOptions
from gemmaqat.interop.packed_folder import is_packed_folder
from gemmaqat.interop.shipment import Shipment
from gemmaqat.interop.source import of_model
from gemmaqat.interop.verify import verify as run_verification
from gemmaqat.json_file import read_json
from gemmaqat.models.config import ModelConfig
from gemmaqat.quantization.activations import check_scales, prepare
from gemmaqat.quantization.convert import convert
from gemmaqat.quantization.table import Table
from gemmaqat.training.start import load_run


def export(options: Any) -> None:
    """Writes a checkpoint in a deployed format, from codes, with its certificate."""
    source = Path(commands._required(options, "checkpoint", ""))
    section = _section(source, options)
    name = options.format or section.format
    if not name:
        raise ValueError("--format: missing; name one, as in --format=gguf.")
    if name != section.format and section.format:  # its options are those of its format
        section = ExportConfig()
    choices = _choices(section, options)
    choices.check_used(name, find_format(name).options)  # before anything is loaded
    check_target(commands._workdir(options))
    certificate = run_export(
        _shipment(source, options),
        commands._workdir(options),
        format=name,
        options=choices,
        progress=commands._progress(),
    )
    print(certificate.headline)
    for tensor in certificate.tensors:
        if tensor.note:
            logging.info("%s (%s): %s", tensor.path, tensor.stored, tensor.note)
    print(f"wrote {options.workdir}: contents {certificate.contents_sha256}")


def verify(options: Any) -> None:
    """Reads an exported folder or file again and compares it with its certificate."""
    path = commands._required(options, "checkpoint", options.workdir)
    print(run_verification(path, progress=commands._progress()))


def _section(source: Path, options: Any) -> ExportConfig:
    """The export that --config asks for, or else the config of the run."""
    if options.config is not None:
        return commands._experiment(options).export
    if commands._is_run(source):
        return configs.load(source / "config.json").export
    return ExportConfig()


def _choices(section: ExportConfig, options: Any) -> ExportOptions:
    """Options of the config, and over them the flags that were given."""
    known = [field.name for field in dataclasses.fields(ExportOptions)]
    for key in section.options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}."
            raise ValueError(f"config.export.options: no field {key!r}; {hint}")
    given = {key: options[key].value for key in known if options[key].present}
    chosen = {**section.options, **given}
    if "prefill_lengths" in chosen:  # a list from a flag, or from the saved config of a run
        chosen["prefill_lengths"] = tuple(chosen["prefill_lengths"])
    return ExportOptions(**chosen)


def _shipment(source: Path, options: Any) -> Shipment:
    """What is to be exported, with all that is known of how it was made."""
    if commands._is_run(source):
        return _of_run(source, options)
    if is_packed_folder(source) or detect(source)[0] != "hf":
        shipment = shipment_of(source, None)
        _check_config(source, shipment.table, shipment.config, options)
        return dataclasses.replace(shipment, provenance={"source": str(source)})
    experiment = commands._experiment(options)
    experiment = dataclasses.replace(
        experiment, model=dataclasses.replace(experiment.model, checkpoint=str(source))
    )
    table = commands._resolve(experiment, commands._model_config(experiment))
    if table.calibrated:
        raise ValueError(
            f"--config: recipe {table.recipe!r} quantizes activations, whose scales are calibrated "
            "from data; run `gemmaqat quantize` or `train` first and export what it wrote."
        )
    shipment = shipment_of(source, table)
    return dataclasses.replace(shipment, provenance=_about(source, experiment))


def _of_run(source: Path, options: Any) -> Shipment:
    """The last checkpoint of a work directory, rounded to the table it was trained for."""
    experiment = configs.load(source / "config.json")
    run = load_run(source)
    table = run.table
    if table is None:
        chosen = commands._experiment(options)
        table = commands._resolve(chosen, run.model.config)
        if table.activations:
            raise ValueError(
                f"{source}: trained in float; run `gemmaqat quantize` to calibrate the activations "
                f"of recipe {table.recipe!r}, and export what it wrote."
            )
    _check_config(source, table, run.model.config, options)
    prepared = prepare(run.model, table)
    try:
        check_scales(prepared, table)
    except ValueError as error:
        raise ValueError(f"{source}, step {run.step}: {error}") from None
    model = convert(prepared, table)
    shipment = of_model(model, table)
    if base := read_base(source):
        shipment = base.added_to(shipment)
    elif experiment.model.checkpoint and not options.text_only:
        raise FileNotFoundError(
            f"{source / BASE}: missing, it holds what {experiment.model.checkpoint} has beside the "
            "text decoder; restore it from a copy, or give --text_only."
        )
    about = _about(source, experiment) | {"step": run.step, "run": _run_hashes(source)}
    about["evaluations"] = [
        {"file": str(path)} | read_json(path, "evaluate again")
        for path in sorted((source / FOLDER).glob(f"*/{METRICS}"))
    ]
    return dataclasses.replace(shipment, provenance=about)


def _check_config(source: Path, table: Table, config: ModelConfig, options: Any) -> None:
    """Refuses a --config by which this source would have other codes than it has."""
    if options.config is None:
        return
    wanted = commands._resolve(commands._experiment(options), config)
    for path, entry in wanted.by_path.items():
        found = table[path].grid
        if found != entry.grid:
            here, there = (g.describe() if g else "float" for g in (found, entry.grid))
            raise ValueError(
                f"--config: recipe {wanted.recipe!r} has {path} in {there}, and {source} holds "
                f"{table.recipe or 'codes'} with {here}; leave --config out, or export the float "
                "checkpoint."
            )


def _about(source: Path, experiment: Experiment) -> dict[str, Any]:
    fields = configs.to_json(experiment)
    return {
        "source": str(source),
        "config_sha256": _sha256(fields),
        "data_sha256": _sha256(fields["data"]),
    }


def _run_hashes(source: Path) -> Any:
    """SHA-256 of the parameters that a run rests on, and the versions it ran with."""
    about = read_json(source / "run.json", "restore it from a copy")
    return {key: about.get(key) for key in ("versions", "seeds", "hashes")}


def _sha256(fields: Any) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
