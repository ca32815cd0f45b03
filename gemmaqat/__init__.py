"""gemmaqat: quantization-aware training of Gemma 4 in JAX, against its fair control.

From a model to low-bit weights:

    import gemmaqat as gq

    model = gq.Gemma4(gq.model_config("e2b_mini"), rngs=nnx.Rngs(0))
    table = gq.resolve("int4_channel", model)
    packed = gq.convert(model, table)
"""

__version__ = "0.1.0"  # first: modules below write it into files

from gemmaqat.compare import Comparison as Comparison
from gemmaqat.compare import compare as compare
from gemmaqat.compare import evaluate as evaluate
from gemmaqat.evaluation.results import Results as Results
from gemmaqat.evaluation.results import results as results
from gemmaqat.generation import Generation as Generation
from gemmaqat.generation import generate as generate
from gemmaqat.interop.export import export as export
from gemmaqat.interop.load import load_pretrained as load_pretrained
from gemmaqat.models.config import ModelConfig as ModelConfig
from gemmaqat.models.sizes import model_config as model_config
from gemmaqat.models.transformer import Gemma4 as Gemma4
from gemmaqat.models.transformer import Output as Output
from gemmaqat.packed import PackedTensor as PackedTensor
from gemmaqat.quantization.activations import prepare as prepare
from gemmaqat.quantization.calibration import calibrate as calibrate
from gemmaqat.quantization.convert import convert as convert
from gemmaqat.quantization.fake import fake_quantize as fake_quantize
from gemmaqat.quantization.grids import Grid as Grid
from gemmaqat.quantization.rule import Rule as Rule
from gemmaqat.quantization.rules import resolve as resolve
from gemmaqat.quantization.table import Table as Table
from gemmaqat.training.loop import FitResult as FitResult
from gemmaqat.training.loop import fit as fit
from gemmaqat.training.loop import train as train
