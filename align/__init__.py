"""Alignment training as recipes: SFT, DPO and what is built on them, one command a chain."""

import os

__version__ = "0.1.0"

# TRL sends a usage ping whenever a trainer is built. huggingface_hub reads this once, when it is first imported.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# For a model of the hub without safetensors, transformers sends the user's token to a Space that opens a pull request
# (transformers 5.23, safetensors_conversion.py); vLLM reports its use. Who wants it sets these otherwise.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
