"""A small closed world: a village whose questions have one right answer each, and a tiny model that has read about it."""
