"""From a MODEL argument to a checkpoint: folder, hub, GGUF, quantized or pickled weights; tokenizer; full model."""
