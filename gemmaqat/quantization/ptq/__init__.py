"""Post-training quantization: one method per file, one signature."""
