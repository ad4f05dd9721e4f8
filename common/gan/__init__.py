"""The networks and losses of the GAN, and their flat parameter vectors."""
