"""Controllable generation: control signals, the datasets that pair them with images, the hint encoder and its pipeline."""
