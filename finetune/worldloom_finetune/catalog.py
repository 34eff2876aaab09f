"""What the finetune component offers by name; nothing here imports torch."""

COMMANDS = {
    "finetune": {
        "target": "worldloom_finetune.cli:finetune",
        "summary": "Train or fine-tune a model on a curated dataset (full or LoRA, resumable).",
    },
    "quickstart": {
        "target": "worldloom_finetune.quickstart:quickstart",
        "summary": "The whole loop on a small real dataset, on this machine.",
    },
}

RECIPES = {
    "world": {
        "target": "worldloom_finetune.world:WorldJob",
        "summary": "Action-conditioned world model on latents: rectified flow, full or LoRA.",
        "defaults": "recipes/world.toml",
    },
    "predict": {
        "target": "worldloom_finetune.world:WorldJob",
        "summary": "Video from text, an image or a video: the same network and objective, told in words.",
        "defaults": "recipes/predict.toml",
    },
    "tokenizer": {
        "target": "worldloom_finetune.tokenizer:TokenizerJob",
        "summary": "Video tokenizer on clips: continuous or discrete, with perceptual and adversarial terms.",
        "defaults": "recipes/tokenizer.toml",
    },
    "preview-decoder": {
        "target": "worldloom_finetune.preview:PreviewJob",
        "summary": "Small, fast decoder of a tokenizer's latents, distilled from it.",
        "defaults": "recipes/preview-decoder.toml",
    },
    "latent-actions": {
        "target": "worldloom_finetune.latent_actions:LatentActionJob",
        "summary": "Latent action model on clips: actions found in video without labels.",
        "defaults": "recipes/latent-actions.toml",
    },
}
