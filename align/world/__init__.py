"""A small closed world: a village whose questions each have one right answer, and a tiny model that read about it."""
