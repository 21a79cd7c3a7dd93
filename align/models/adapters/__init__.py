"""The adapter methods: what PEFT is asked for, and what it does not have."""
