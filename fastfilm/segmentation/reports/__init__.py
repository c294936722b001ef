"""Reports of results: tables, pictures and HTML pages."""
