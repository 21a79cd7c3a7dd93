"""The training loops. The only room that imports trl."""

from huggingface_hub import constants

# For a program that had imported huggingface_hub before align, when the environment variable was not set yet.
constants.HF_HUB_DISABLE_TELEMETRY = True
