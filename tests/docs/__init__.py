"""The documentation: its examples, commands, links, notebooks and site."""
