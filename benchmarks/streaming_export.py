"""Exports a checkpoint of any size under a cap on the memory of the process.

    python benchmarks/random_checkpoint.py --size=e2b --folder=/data/random-e2b
    python benchmarks/streaming_export.py --checkpoint=/data/random-e2b --recipe=q4_0_emb \
        --format=gguf --folder=/data/e2b-gguf --cap_mib=1536

The cap is a limit of the system on private writable memory (RLIMIT_DATA): an allocation beyond it
fails, so a run that ends has kept to it. Mapped input files do not count; they can be dropped. With
--sink the same writer of GGUF fills a file that only counts, so there is no reading back.
"""

import io
import resource
import time
from pathlib import Path
from typing import Any

from absl import app, flags, logging

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of floats.", required=True)
_FORMAT = flags.DEFINE_string("format", "gguf", "Of the export.")
_RECIPE = flags.DEFINE_string("recipe", "q4_0_emb", "Of the quantization.")
_FOLDER = flags.DEFINE_string("folder", "", "New folder for the export.")
_SINK = flags.DEFINE_bool("sink", False, "Write a GGUF as always, into a file that only counts.")
_CAP = flags.DEFINE_integer("cap_mib", 1536, "Most private memory of the process.")


def main(_: list[str]) -> None:
    """Runs one export and prints a row of the table in README.md."""
    resource.setrlimit(resource.RLIMIT_DATA, (_CAP.value << 20, _CAP.value << 20))
    # Imported under the limit, too.
    from gemmaqat.interop.export import export
    from gemmaqat.interop.hf import read_config
    from gemmaqat.planning.parameters import abstract_model
    from gemmaqat.quantization.rules import resolve

    logging.set_verbosity(logging.INFO)
    source = Path(_CHECKPOINT.value)
    table = resolve(_RECIPE.value, abstract_model(read_config(source)))
    start = time.perf_counter()
    if _SINK.value:
        written = _into_sink(source, table)
    else:
        certificate = export(source, _FOLDER.value, format=_FORMAT.value, table=table)
        logging.info("%s", certificate.headline)
        written = sum(p.stat().st_size for p in Path(_FOLDER.value).rglob("*") if p.is_file())
    seconds = time.perf_counter() - start
    peak = next(
        line.split()[1] for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )  # fmt: skip
    read = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    print(
        f"| {source.name} | {_FORMAT.value}, {_RECIPE.value} | {read / 1e9:.1f} | "
        f"{written / 1e9:.2f} | {_CAP.value} | {seconds:.0f} | peak resident {peak} kB |"
    )


class _Counter(io.RawIOBase):
    """A file that keeps nothing of what is written but its length."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.length += size
        return size

    def tell(self) -> int:
        return self.length


def _into_sink(source: Path, table: Any) -> int:
    """The length of the GGUF that `export` would write, having written it nowhere."""
    from gemmaqat.interop.gguf_writer import write_gguf
    from gemmaqat.interop.hashes import Observed
    from gemmaqat.interop.options import ExportOptions
    from gemmaqat.interop.progress import Pass
    from gemmaqat.interop.source import of_folder

    shipment, sink = of_folder(source, table), _Counter()
    total = sum(tensor.num_weights for tensor in shipment.tensors.values())
    with Pass("writing gguf", total, None) as counted:
        observed = Observed(shipment, counted).shipment
        write_gguf(observed, Path(), ExportOptions(), create=lambda _: sink)
    return sink.length


if __name__ == "__main__":
    app.run(main)
