"""A model's own critiques, revisions and verdicts, by the principles of a constitution, as training data."""
