"""One file a stage: `run(stage, context) -> Manifest`, on every rank."""
