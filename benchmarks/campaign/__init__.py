"""One command that builds, checks, tunes, measures and reports within a time budget: ``--suite campaign``."""
