"""What `do=` may ask for besides training: one file a verb."""
