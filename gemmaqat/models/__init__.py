"""Gemma 4 text decoders in Flax NNX; knows nothing of quantization but hook points."""
