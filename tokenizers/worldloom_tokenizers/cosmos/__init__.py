"""Cosmos-Tokenizer: continuous and discrete, video and image."""
