"""The self-contained HTML page that a run leaves."""
