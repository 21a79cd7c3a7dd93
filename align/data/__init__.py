"""Rows from files, hubs and the embedded world to tokenised data sets; nothing is changed or lost without a number."""
