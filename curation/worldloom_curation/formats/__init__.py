"""One file per family of export formats; see `worldloom_curation.export`."""
