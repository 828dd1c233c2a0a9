"""What of the documentation is made by programs: the pages that repeat the code, and the screenshot."""
