"""What the model zoo offers by name; nothing here imports torch."""

COMMANDS = {
    "generate": {
        "target": "worldloom_model_zoo.cli:generate",
        "summary": "Make a video from an image, a video, actions or text.",
    },
    "eval": {
        "target": "worldloom_model_zoo.cli:evaluate",
        "summary": "Measure a model on a dataset; a table and an HTML report.",
    },
}

FAMILIES = {
    "predict": {
        "target": "worldloom_model_zoo.predict.checkpoint:load",
        "summary": "Video diffusion transformer: generation, action-conditioned dynamics, stepping.",
        "importer": "worldloom_model_zoo.predict.released:import_released",
        "exporter": "worldloom_model_zoo.predict.released:export_released",
    },
    "cosmos3": {
        "target": "worldloom_model_zoo.predict.cosmos3:load",
        "summary": "NVIDIA Cosmos 3 through diffusers: video, dynamics and policy.",
        "importer": "worldloom_model_zoo.predict.cosmos3:import_folder",
    },
}

MODELS = {
    "loom-predict-nano": {
        "target": "worldloom_model_zoo.predict.checkpoint:load",
        "summary": "Video from text, an image or a video: eight simulated worlds, 64x64.",
        "family": "predict",
        "path": "weights/loom-predict-nano",
        "sha256": "94f329617e16f469938a36f3c6c20432d4a5be230951ff57b61bb9dce4c65b2b",
    },
    "loom-world-nano": {
        "target": "worldloom_model_zoo.predict.checkpoint:load",
        "summary": "Interactive world model of a 3-D maze (ViZDoom), 64x64, stepped by actions.",
        "family": "predict",
        "path": "weights/loom-world-nano",
        "sha256": "4be3afbf5a59374a3025a19e4ba136d509e009997fb31ab2ab1a706288a8a938",
    },
}
