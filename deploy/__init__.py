"""What an operator runs: the command line and the one-machine federation."""
