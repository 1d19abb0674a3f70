"""What everything stands on: errors, files, locks, signals, terminal output, paths, devices."""
