"""The score of one model on one task: one benchmark a file, ``tasks.py`` puts them together."""
