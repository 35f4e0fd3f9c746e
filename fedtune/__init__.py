"""Federated LoRA tuning of language models over unequal devices."""

__version__ = "0.1.0"
