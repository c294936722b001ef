"""Tables, pictures and HTML pages of results."""
