"""Transformers as a reader of exports: its loading report, its logits, its dequantized weights."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.gemma_quant import QuantizedEmbedding, QuantizedLinear

from gemmaqat.interop.hf import tensor_name
from gemmaqat.interop.shipment import Shipment
from gemmaqat.interop.source import values


class Model:
    """A folder loaded in float32 with plain attention.

    Attributes:
        complaints: keys that the loading report calls missing, unexpected or mismatched.
    """

    def __init__(self, folder: Path, **options: Any):
        self._model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            **{"attn_implementation": "eager"} | options,
        )
        self.complaints = [key for keys in report.values() for key in keys]

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """float32 `[B, T, V]`."""
        with torch.no_grad():
            return self._model(torch.tensor(ids)).logits.numpy()

    def equal(self, shipment: Shipment) -> str:
        """Share of weights that are dequantized to ours; only after the first `logits`."""
        equal = total = 0
        for path, tensor in shipment.tensors.items():
            if path in shipment.table.activation_scales:
                continue
            found = self._weight(f"model.{tensor_name(path)}")
            ours = values(tensor, tensor.read(0, tensor.num_rows))
            equal += int(np.sum(found.reshape(ours.shape) == ours))
            total += tensor.num_weights
        return f"{equal / total:.2%}"

    def _weight(self, name: str) -> np.ndarray:
        module_name, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(module_name)
        if isinstance(module, QuantizedLinear):
            value = module._dequantize_weights(torch.float32)
        elif isinstance(module, QuantizedEmbedding):
            value = module.weight
        else:
            value = getattr(module, leaf)
        return value.detach().float().numpy()
