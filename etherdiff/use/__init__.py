"""Commands that use a base or a run: generate, merge, export, inspect, demo, schema."""
