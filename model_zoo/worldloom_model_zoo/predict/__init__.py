"""The predict family: generation and world dynamics."""
