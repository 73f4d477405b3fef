"""Sphinx configuration."""

import importlib.metadata

project = "jaxmeta"
author = "the jaxmeta authors"
release = importlib.metadata.version("jaxmeta")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
html_theme = "sphinx_book_theme"
html_title = "jaxmeta"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_use_ivar = True  # a NamedTuple's fields are documented once, not as members as well
exclude_patterns = ["_build"]
