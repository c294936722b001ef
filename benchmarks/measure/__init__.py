"""Time, check and record: how a run measures any subject, and how it prints what it found."""
