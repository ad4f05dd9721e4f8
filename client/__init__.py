"""What runs inside a hospital: its data, its training, its accounting."""
