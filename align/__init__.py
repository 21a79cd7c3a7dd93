"""Alignment training as recipes: SFT, DPO and what is built on them, one command a chain."""

__version__ = "0.1.0"
