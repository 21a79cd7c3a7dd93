"""Pure losses: tensors in and out, torch only."""
