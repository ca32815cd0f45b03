"""gemmaqat: quantization-aware training of Gemma 4 in JAX, against its fair control."""

from gemmaqat.models.config import ModelConfig as ModelConfig
from gemmaqat.models.sizes import model_config as model_config
from gemmaqat.models.transformer import Gemma4 as Gemma4
from gemmaqat.models.transformer import Output as Output

__version__ = "0.1.0"
