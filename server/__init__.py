"""What the coordinator runs: rounds, aggregation, synthesis, the report. It never sees an image."""
