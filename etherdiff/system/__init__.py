"""Foundations of the package: errors, files, downloads, locks, signals, terminal output, devices."""
