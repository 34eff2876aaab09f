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
        "sha256": "38633ad3d44e3f80e18df5a9774d48127d68c9549c4546646f2ea3578850e68e",
        "preview": "weights/loom-cv-nano-preview",
        "preview_sha256": "cc81751e4897f171669fb8695869365b1378d90be5ad0b3635da28ec63c79633",
    },
    "loom-dv-nano": {
        "target": "worldloom_tokenizers.checkpoint:load",
        "summary": "Discrete causal autoencoder, 4x8x8, 4 codes of 1000; small enough for a CPU.",
        "path": "weights/loom-dv-nano",
        "sha256": "a956f70fa8a9bd9f47f64c1bb529ef6e85ab3675711e229ab3e45a3daa6aa999",
    },
    "loom-lam-nano": {
        "target": "worldloom_tokenizers.latent_actions:load",
        "kind": "latent-actions",
        "summary": "Latent action model: one of 8 codes for what happens between two frames, found without labels.",
        "path": "weights/loom-lam-nano",
        "sha256": "9f31fe83d18543f0cd12653c7c8147e0a3970f303cb74f3be937ca6fb155890e",
    },
}

EMBEDDERS = {
    "efficientnet-lite0": {
        "target": "worldloom_tokenizers.embedders:pictures",
        "summary": "Pictures by what they show.",
    },
    "minilm": {
        "target": "worldloom_tokenizers.embedders:texts",
        "summary": "Captions by what they mean.",
    },
    "clip": {
        "target": "worldloom_tokenizers.embedders:Clip",
        "summary": "Pictures and texts in one space: a CLIP or SigLIP model from a folder.",
    },
}

ENCODERS = {
    "latents": {
        "target": "worldloom_tokenizers.encode:latent_encoder",
        "summary": "Clips to windows of latents, by a video tokenizer.",
    },
    "text": {
        "target": "worldloom_tokenizers.text:load_text_encoder",
        "summary": "Captions to the token vectors that generators attend to.",
    },
}

GUARDS = {
    "classifier": {
        "target": "worldloom_tokenizers.prompt_guard:classifier",
        "summary": "Refuses prompts that mean what the blocklist names, in other words.",
        "stage": "before",
    },
}
