"""LeRobot datasets, read (v2.0, v2.1, v3.0) and written (v3.0) with pyarrow and PyAV alone.

The format is that of https://github.com/huggingface/lerobot (``docs/source/lerobot-dataset-v3.mdx``, ``datasets/``).
"""
