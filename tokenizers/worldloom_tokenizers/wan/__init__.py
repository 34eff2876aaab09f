"""The Wan video autoencoders: 2.1, which Cosmos-Predict2 to Transfer2.5 use, and 2.2, which Cosmos 3 uses."""
