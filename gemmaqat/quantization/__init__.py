"""Rules, integer grids, fake quantization and conversion. Knows paths and arrays, not Gemma."""
