"""Ranks, process groups and ZeRO. The only room that imports deepspeed."""
