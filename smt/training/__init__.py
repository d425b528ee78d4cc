"""A training run: its settings, its loop and the folder that it leaves."""
