"""The run folder: its files, its settings, its results and its models."""
