"""Where figures go: the run folder always, wandb when asked."""
