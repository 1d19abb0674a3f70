"""Reading, cropping and showing images."""
