"""Scores of generated images, and what is needed to trust them: which network, which preprocessing, which images."""
