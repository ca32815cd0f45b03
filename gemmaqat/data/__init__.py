"""Sources, tokenizers, chat templates, packing and the resumable loader."""
