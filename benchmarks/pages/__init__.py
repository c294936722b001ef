"""Pages of the documentation that are written from committed results."""
