"""Worldloom component."""
