"""One file a command of ``fastfilm``; ``fastfilm.cli`` lists them and imports each when it is called."""
