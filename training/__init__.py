"""Training recipes: scripts to run, not part of the installed package."""
