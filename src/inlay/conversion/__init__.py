"""Adapters to and from other forms: LoRA, GGUF, merged models, PEFT's adapters, folds."""
