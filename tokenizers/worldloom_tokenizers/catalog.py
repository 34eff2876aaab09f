"""What the tokenizers component offers by name; nothing here imports torch."""

COMMANDS = {
    "tokenize": {
        "target": "worldloom_tokenizers.cli:tokenize",
        "summary": "Encode, decode, evaluate and train video tokenizers.",
    },
}

TOKENIZERS = {
    "loom-cv-nano": {
        "target": "worldloom_tokenizers.checkpoint:load",
        "summary": "Continuous causal autoencoder, 4x8x8, 16 channels; small enough for a CPU.",
        "path": "weights/loom-cv-nano",
        "sha256": "845f597e4f9cd5dbcd0930a221f32bc69b57a407f18b157361b6645b64cdc0b4",
    },
    "loom-lam-nano": {
        "target": "worldloom_tokenizers.latent_actions:load",
        "kind": "latent-actions",
        "summary": "Latent action model: one of 8 codes for what happens between two frames, found without labels.",
        "path": "weights/loom-lam-nano",
        "sha256": "9f31fe83d18543f0cd12653c7c8147e0a3970f303cb74f3be937ca6fb155890e",
    },
}
