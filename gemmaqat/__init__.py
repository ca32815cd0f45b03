"""gemmaqat: quantization-aware training of Gemma 4 in JAX, against its fair control."""
