"""One module a suite; each has ``run(session)`` and adds its rows to the session."""
