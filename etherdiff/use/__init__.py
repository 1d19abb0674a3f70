"""What one does with a base or a run: generate, merge, export, inspect, demo."""
