"""Sphinx configuration. Pages are Markdown (MyST); `make docs` builds them with warnings as errors."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import worldloom

project = "Worldloom"
author = "The Worldloom authors"
copyright = "The Worldloom authors"
version = release = worldloom.__version__

extensions = ["myst_parser", "reference"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
nitpicky = True

html_theme = "furo"
html_title = "Worldloom"
html_static_path: list[str] = []
html_show_sphinx = False
html_show_copyright = False
