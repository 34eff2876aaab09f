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
    "idle": {
        "target": "worldloom_curation.stages.idle:IdleStage",
        "summary": "Robot episodes: drop those in which nothing is done, and cut idle ends off the others.",
    },
    "sync": {
        "target": "worldloom_curation.stages.sync:SyncStage",
        "summary": "Robot episodes: drop those whose actions and pictures are too many frames apart.",
    },
    "outliers": {
        "target": "worldloom_curation.stages.outliers:OutliersStage",
        "summary": "Robot episodes: drop those with actions that are no numbers or far from all the others.",
    },
    "jerk": {
        "target": "worldloom_curation.stages.jerk:JerkStage",
        "summary": "Robot episodes: drop those with far jerkier actions than the others.",
    },
    "success": {
        "target": "worldloom_curation.stages.success:SuccessStage",
        "summary": "Robot episodes: drop those that failed at their task.",
    },
    "black": {
        "target": "worldloom_curation.stages.black:BlackStage",
        "summary": "Cut black frames out.",
    },
    "frozen": {
        "target": "worldloom_curation.stages.frozen:FrozenStage",
        "summary": "Cut stretches out in which the picture stands still.",
    },
    "flicker": {
        "target": "worldloom_curation.stages.flicker:FlickerStage",
        "summary": "Drop clips whose brightness jumps from frame to frame.",
    },
    "exposure": {
        "target": "worldloom_curation.stages.exposure:ExposureStage",
        "summary": "Drop clips that are too dark or too bright to show anything.",
    },
    "blur": {
        "target": "worldloom_curation.stages.blur:BlurStage",
        "summary": "Drop clips that are blurred.",
    },
    "overlay_text": {
        "target": "worldloom_curation.stages.overlay_text:OverlayTextStage",
        "summary": "Drop clips with subtitles, logos and other text burnt in.",
    },
    "camera": {
        "target": "worldloom_curation.stages.camera:CameraStage",
        "summary": "Label clips by how the camera moves; drop the labels that are unwanted.",
    },
    "safety": {
        "target": "worldloom_curation.stages.safety:SafetyStage",
        "summary": "Drop clips in which nudity is seen.",
    },
    "text_safety": {
        "target": "worldloom_curation.stages.text_safety:TextSafetyStage",
        "summary": "Drop clips whose caption the guards of prompts refuse.",
    },
    "quality": {
        "target": "worldloom_curation.stages.quality:QualityStage",
        "summary": "Drop clips of bad pictures, by a no-reference measure or an aesthetic head on CLIP.",
    },
    "semantic_duplicates": {
        "target": "worldloom_curation.stages.semantic_duplicates:SemanticDuplicatesStage",
        "summary": "Drop clips that show what another shows, by vectors and k-means.",
    },
    "near_duplicates": {
        "target": "worldloom_curation.stages.near_duplicates:NearDuplicatesStage",
        "summary": "Drop near-copies: encoded again, resized, cropped, shifted in time.",
    },
    "motion_vectors": {
        "target": "worldloom_curation.stages.motion_vectors:MotionVectorsStage",
        "summary": "Drop clips with little motion by stored motion vectors, or by flow where there are none.",
    },
    "caption_windows": {
        "target": "worldloom_curation.stages.caption_windows:CaptionWindowsStage",
        "summary": "Have a model describe every window of a clip, through an OpenAI-compatible endpoint.",
    },
    "caption": {
        "target": "worldloom_curation.stages.caption:CaptionStage",
        "summary": "Write captions of recorded episodes from what the recorder knows.",
    },
    "text_embeddings": {
        "target": "worldloom_curation.stages.text_embeddings:TextEmbeddingsStage",
        "summary": "Store the token vectors of captions with the clips.",
    },
    "embeddings": {
        "target": "worldloom_curation.stages.embeddings:EmbeddingsStage",
        "summary": "Store vectors of a few frames with every clip, for search.",
    },
    "latents": {
        "target": "worldloom_curation.stages.latents:LatentsStage",
        "summary": "Encode the clips by a video tokenizer into DIR/latents, for training.",
    },
}
