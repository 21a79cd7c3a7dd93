"""Alignment training as recipes: SFT, DPO and what is built on them, one command a chain."""

import os

__version__ = "0.1.0"

# TRL sends a usage ping whenever a trainer is built. huggingface_hub reads this once, when it is first imported.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
