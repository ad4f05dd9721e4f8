"""What hospitals and coordinator share: the study, the networks, the privacy mechanism, the messages."""
