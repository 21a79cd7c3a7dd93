"""The training loops. The only room that imports trl."""

import os

# TRL sends a usage ping when a trainer is built. Must be set before anything imports it.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
