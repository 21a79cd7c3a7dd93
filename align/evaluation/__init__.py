"""Is it better, what did it forget, can the number be trusted: figures of replies and verdicts, without torch."""
