"""The generated parts of the documentation: the pages that repeat the code, and the screenshots."""
