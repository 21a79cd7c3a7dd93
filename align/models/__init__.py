"""Models and tokenizers: finding, loading, adapting and saving them."""
