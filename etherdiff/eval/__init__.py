"""Scores of generated images, each with the networks, the preprocessing and the images that it was computed with."""
