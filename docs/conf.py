"""Sphinx configuration: Markdown through MyST, the Furo theme; `make docs` builds and serves it."""

project = "etherdiff"
author = "The etherdiff authors"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "etherdiff"
exclude_patterns = ["_build"]
autodoc_typehints = "description"
autodoc_member_order = "bysource"
