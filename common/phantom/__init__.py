"""Phantoms: pictures of patients who are nobody, for warm starts, tests and demonstrations."""
