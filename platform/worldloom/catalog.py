"""What the platform itself offers: its commands."""

COMMANDS = {
    "doctor": {
        "target": "worldloom.doctor:doctor",
        "summary": "What is installed, what fits, what is missing and how to get it.",
    },
    "lineage": {
        "target": "worldloom.lineage:lineage",
        "summary": "Walk from a sample, model or dataset back to its source files.",
    },
    "models": {
        "target": "worldloom.models:models",
        "summary": "List and show the models and tokenizers this machine knows.",
    },
    "serve": {
        "target": "worldloom.serving:serve",
        "summary": "Serve a model over HTTP: jobs, results, health.",
    },
}
