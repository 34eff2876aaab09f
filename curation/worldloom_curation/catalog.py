"""What curation offers, by name. Imports nothing."""

COMMANDS = {
    "curate": {
        "target": "worldloom_curation.cli:curate",
        "summary": "Turn videos or recorded episodes into a dataset of clips, with a reason for every decision.",
    },
}

STAGES = {
    "split": {
        "target": "worldloom_curation.stages.split:SplitStage",
        "summary": "Cut sources into clips, at shot boundaries or at a fixed length.",
    },
    "motion": {
        "target": "worldloom_curation.stages.motion:MotionStage",
        "summary": "Drop clips in which nothing moves.",
    },
    "duplicates": {
        "target": "worldloom_curation.stages.duplicates:DuplicatesStage",
        "summary": "Drop clips whose decoded frames were seen before.",
    },
    "caption": {
        "target": "worldloom_curation.stages.caption:CaptionStage",
        "summary": "Write captions of recorded episodes from what the recorder knows.",
    },
}
