"""``python -m worldloom``."""

from worldloom.cli import main

main(prog_name="worldloom")
