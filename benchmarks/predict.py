"""The predict family against diffusers and against itself without its caches: same random weights, same output.

Every case runs in a process of its own and measures both sides in turn. The figures are medians of seconds; a ratio is
the median of the ratios of pairs, theirs (or the plain way) / ours, higher is better. Each case first checks that both
sides give the same. With OMP_NUM_THREADS=1 seconds are those of the process's own work, and a busy machine disturbs
them little.

- ``step``: one denoising call of the network against diffusers' CosmosTransformer3DModel, with a noise level per frame
  (image and video to world) and with one for all frames (text to world).
- ``video2world``: a whole video against diffusers' Cosmos2_5_PredictBasePipeline (UniPC, guidance, text vectors given),
  decoded. What is gained depends on the parts' shares, which are printed: once with Wan2.1's autoencoder at its full
  width and few steps, once with a narrow one, once with a narrow one and a network that is most of the work on both
  sides. Each again with the encoded start on disk.
- ``rollout``: frame-by-frame stepping with the key-value cache against recomputing the whole context.
- ``constant``: a step of the shipped world 500 frames after its start against one 16 frames after it.
- ``skip``: step skipping on a trained model: the time it saves and what it changes, in decibels of decoded frames.

    python benchmarks/predict.py [--quick] [--cases step video2world rollout constant skip]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# Python puts this folder first on its path, where tokenizers.py would be Hugging Face's package of that name.
sys.path = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

CONTEXT, TEXT = 1024, 512  # size of a text vector, tokens of a text


def clock() -> float:
    """Seconds: of this process's own work with one thread, where other processes do not count; else by the wall."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def interleaved(calls: list[Callable[[], Any]], pairs: int) -> tuple[list[float], float]:
    """Median seconds of each call, and the median of the ratios of the second's to the first's."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(pairs):
        for call, times in zip(calls, seconds, strict=True):
            began = clock()
            call()
            times.append(clock() - began)
    ratio = statistics.median(b / a for a, b in zip(seconds[0], seconds[1], strict=True))
    return [statistics.median(times) for times in seconds], ratio


def networks(width: int, blocks: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and theirs, Cosmos-Predict2.5's of this width and depth, with equal random weights."""
    from diffusers.models.transformers.transformer_cosmos import CosmosTransformer3DModel

    from worldloom_model_zoo.predict.config import cosmos_predict25_2b
    from worldloom_model_zoo.predict.keys import renaming
    from worldloom_model_zoo.predict.model import PredictTransformer

    torch.manual_seed(0)
    config = replace(
        cosmos_predict25_2b(),
        width=width,
        heads=width // 128,
        blocks=blocks,
        text_dim=0,  # the projection of text, 100,352 to 1024, would weigh more than the rest at this size
        padding_mask=False,  # diffusers resizes it with torchvision
        qk_eps=1e-5,  # diffusers'
    )
    ours = PredictTransformer(config).eval()
    for parameter in ours.parameters():  # at its initialisation the network is zero, and any bug would pass
        torch.nn.init.normal_(parameter, std=0.02 if parameter.ndim > 1 else 0.5)
    theirs = CosmosTransformer3DModel(
        in_channels=17,
        out_channels=16,
        num_attention_heads=config.heads,
        attention_head_dim=128,
        num_layers=blocks,
        text_embed_dim=CONTEXT,
        adaln_lora_dim=256,
        max_size=(128, 240, 240),
        rope_scale=config.rope_ratios,
        concat_padding_mask=False,
        extra_pos_embed_type=None,
        encoder_hidden_states_channels=CONTEXT,
    )
    names = renaming(ours.state_dict(), "diffusers")
    theirs.load_state_dict({names[key]: value for key, value in ours.state_dict().items()})
    return ours, theirs.eval()


@torch.inference_mode()
def step(per_frame: bool, width: int, blocks: int, frames: int, pairs: int) -> dict[str, float]:
    """One denoising call of a sampler: latent frames of 16x24, 96 tokens each, and 512 tokens of text.

    A sampler of ours has every block read the text once for all of its steps; theirs reads it at each call.
    """
    ours, theirs = networks(width, blocks)
    x, text = torch.randn(1, 16, frames, 16, 24), torch.randn(1, TEXT, CONTEXT)
    mask = torch.zeros(1, 1, frames, 16, 24)
    mask[:, :, 0] = 1
    level = torch.full((1, frames), 0.7) if per_frame else torch.full((1,), 0.7)
    if per_frame:
        level[:, 0] = 1e-4
    timestep = level[:, None, :, None, None] if per_frame else level
    read = ours.read_text(text, 1)
    calls = [
        lambda: ours(x, level, text=read, condition_mask=mask),
        lambda: theirs(x, timestep, text, condition_mask=mask, return_dict=False)[0],
    ]
    made = [call() for call in calls]
    difference = float((made[0] - made[1]).abs().max() / made[1].abs().max())
    assert difference < 1e-4, f"the two sides differ by {difference}"
    (mine, other), ratio = interleaved(calls, pairs)
    return {"ours": mine, "theirs": other, "ratio": ratio, "difference": difference}


class _NoGuardrail:
    """Stands where the pipeline wants its safety checker, which needs a download."""

    def to(self, device: object) -> None:
        del device


@torch.inference_mode()
def video2world(
    channels: int, size: tuple[int, int], width: int, blocks: int, frames: int, steps: int, given: int, pairs: int
) -> dict[str, float]:
    """A video from ``given`` frames and a text, with guidance; Wan's autoencoder has 96 ``channels``."""
    import diffusers

    from worldloom_model_zoo.predict.caching import TensorCache
    from worldloom_model_zoo.predict.config import PredictCheckpoint, SamplerConfig
    from worldloom_model_zoo.predict.pipeline import PredictPipeline
    from worldloom_tokenizers.layouts import from_released
    from worldloom_tokenizers.wan import checkpoint as wan
    from worldloom_tokenizers.wan.config import wan21
    from worldloom_tokenizers.wan.model import WanVAE

    height, width_pixels = size
    network, theirs = networks(width, blocks)
    vae_config = replace(wan21(), encoder_width=channels, decoder_width=channels)
    vae = diffusers.AutoencoderKLWan(base_dim=channels, decoder_base_dim=channels).eval()
    tokenizer = WanVAE(vae_config).eval()
    from_released(tokenizer, wan.names(vae_config), vae.state_dict(), "diffusers")
    sampler = SamplerConfig(
        steps=steps,
        method="unipc",
        shift=5.0,
        last_level=1e-3,
        guidance_scale=7.0,
        guidance_convention="conditional",
        condition_level=1e-4,
    )
    checkpoint = PredictCheckpoint(height=height, width=width_pixels, model=network.config, sampler=sampler)
    ours = PredictPipeline(network, tokenizer, checkpoint)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2, flow_shift=5.0
    )
    peer = diffusers.Cosmos2_5_PredictBasePipeline(None, None, theirs, vae, scheduler, _NoGuardrail())
    peer.set_progress_bar_config(disable=True)

    start = torch.rand(1, 3, given, height, width_pixels) * 2 - 1
    text, negative = torch.randn(2, 1, TEXT, CONTEXT).unbind()
    t, known = 1 + (frames - 1) // 4, 1 + (given - 1) // 4
    drawn = (1, 16, t - known, height // 8, width_pixels // 8)
    noise = torch.randn(drawn, generator=torch.Generator().manual_seed(0))  # what our seed 0 draws
    noise = torch.cat([tokenizer.encode(start), noise], dim=2)  # given frames stay only if theirs starts from them

    def make(**options: Any) -> Tensor:
        return ours.generate_video(start, None, frames, text=text, negative=negative, seed=0, **options)

    def make_theirs() -> Tensor:
        return peer(
            video=start,
            prompt_embeds=text,
            negative_prompt_embeds=negative,
            height=height,
            width=width_pixels,
            num_frames=frames,
            num_inference_steps=steps,
            guidance_scale=7.0,
            latents=noise.clone(),
            num_latent_conditional_frames=known,
            conditional_frame_timestep=1e-4,
            output_type="pt",
        ).frames

    made, expected = make(), make_theirs().transpose(1, 2) * 2 - 1  # (b, t, c, h, w) in [0, 1] -> ours
    difference = float((made - expected)[:, :, given:].abs().max())
    assert made[:, :, given:].std() > 0.02
    assert difference < 5e-3, f"the two sides differ by {difference}"
    with tempfile.TemporaryDirectory() as folder:
        cache = TensorCache(folder)
        make(cache=cache)
        (mine, other, kept), ratio = interleaved([make, make_theirs, lambda: make(cache=cache)], pairs)
        assert cache.hits == pairs
    padded = start.repeat(1, 1, -(-frames // given), 1, 1)[:, :, :frames]
    whole = torch.randn(1, 16, t, height // 8, width_pixels // 8)
    parts, _ = interleaved(
        [
            lambda: tokenizer.encode(start),
            lambda: vae.encode(padded),
            lambda: tokenizer.decode(whole),
            lambda: vae.decode(whole),
        ],
        1,
    )
    return {
        "ours": mine,
        "theirs": other,
        "ratio": ratio,
        "kept": kept,
        "kept_ratio": other / kept,
        "difference": difference,
        "encode": parts[0],
        "their_encode": parts[1],
        "decode": parts[2],
        "their_decode": parts[3],
    }


@torch.no_grad()
def rollout(context: int, steps: int, pairs: int) -> dict[str, float]:
    """A latent frame at a context of ``context`` latent frames: denoised and committed, against all recomputed."""
    from worldloom_model_zoo.predict.causal import KVCache
    from worldloom_model_zoo.predict.config import nano
    from worldloom_model_zoo.predict.model import PredictTransformer
    from worldloom_model_zoo.samplers import flow_euler, flow_levels

    torch.manual_seed(0)
    model = PredictTransformer(replace(nano(action_dim=6), window=context + 1)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    levels, cache = flow_levels(steps), KVCache()
    past, actions = torch.randn(1, 16, context, 8, 8), torch.randn(1, 4 * context, 6)
    model(past, past.new_zeros(1, context), actions[:, :-4], cache=cache, commit=True)
    noise = torch.randn(1, 16, 1, 8, 8)

    def cached() -> Tensor:
        """The commit goes into a copy, so that every pair meets the same context."""
        last = actions[:, -4:]
        frame = flow_euler(lambda x, s: model(x, x.new_full((1, 1), s), last, cache=cache), noise, levels)
        copy = replace(cache, keys=list(cache.keys), values=list(cache.values))
        model(frame, frame.new_zeros(1, 1), last, cache=copy, commit=True)
        return frame

    def recomputed() -> Tensor:
        def velocity(x: Tensor, s: float) -> Tensor:
            at = torch.cat([x.new_zeros(1, context), x.new_full((1, 1), s)], dim=1)
            return model(torch.cat([past, x], dim=2), at, actions)[:, :, -1:]

        return flow_euler(velocity, noise, levels)

    difference = float((cached() - recomputed()).abs().max())
    assert difference < 1e-3, f"the two sides differ by {difference}"
    (mine, other), ratio = interleaved([cached, recomputed], pairs)
    return {"ours": mine, "theirs": other, "ratio": ratio, "difference": difference}


@torch.no_grad()
def constant(model: str, early: int, late: int, pairs: int) -> dict[str, float]:
    """Two worlds of one model, stepped in turn: one near its start, one far from it. Frames are video frames."""
    from worldloom_model_zoo import load_model

    near, far = load_model(model), load_model(model)
    start = torch.rand(1, 3, 1, near.config.height, near.config.width) * 2 - 1
    ratio, a = near.frames_per_step, near.action_dim

    def advance(world: Any, frames: int) -> None:
        actions = torch.nn.functional.one_hot(torch.randint(a, (1, frames)), a).float()
        world.rollout(actions)

    for world, frames in ((near, early), (far, late)):
        world.reset(start)
        advance(world, -(-frames // ratio) * ratio)
    (mine, other), change = interleaved([lambda: advance(near, ratio), lambda: advance(far, ratio)], pairs)
    return {"ours": mine, "theirs": other, "ratio": change, "frames_per_second": ratio / other}


@torch.no_grad()
def skip(model: str, data: str, steps: int, method: str, threshold: float, clips: int, pairs: int) -> dict[str, float]:
    """Videos of a trained model with and without step skipping, from real starts or from a recorded simulator."""
    from worldloom_model_zoo import load_model

    pipeline = load_model(model)
    starts, actions, frames = _starts(pipeline, data, clips)
    text = ["the maze"] * clips if pipeline.config.text.name and starts is None else None
    whole = replace(pipeline.sampler, steps=steps, method=method, skip_threshold=0.0)
    skipping = replace(whole, skip_threshold=threshold)

    def make(sampler: Any) -> Tensor:
        return pipeline.generate_video(starts, actions, frames, text=text, seed=0, sampler=sampler)

    given = 0 if starts is None else starts.shape[2]
    error = (make(skipping) - make(whole))[:, :, given:].square().mean(dim=(1, 2, 3, 4)) / 4  # of [0, 1] pixels
    psnr = -10 * torch.log10(error.clamp_min(1e-12))
    (mine, other), ratio = interleaved([lambda: make(skipping), lambda: make(whole)], pairs)
    pooled = float(-10 * torch.log10(error.mean()))
    return {"ours": mine, "theirs": other, "ratio": ratio, "psnr": pooled, "least_psnr": float(psnr.min())}


def _starts(pipeline: Any, data: str, clips: int) -> tuple[Tensor, Tensor | None, int]:
    """Starts of 9 frames and the actions of 8 more, from a dataset of clips or recorded on the spot."""
    from worldloom import media
    from worldloom.shards import open_dataset

    frames, size = 17, (pipeline.config.height, pipeline.config.width)
    videos, actions = [], []
    for sample in open_dataset(data):
        clip = media.read_frames(sample.video, end=frames, size=size)
        if len(clip) == frames:
            videos.append(media.to_tensor(clip))
            if pipeline.action_dim:
                given = torch.from_numpy(sample.arrays["actions"][: frames - 1])[None]
                names = tuple(sample.clip.metadata.get("action_names", ()))
                actions.append(pipeline.align(given, names))
        if len(videos) == clips:
            break
    return torch.cat(videos)[:, :, :9], torch.cat(actions) if actions else None, frames


def apart(task: str, **options: object) -> dict[str, float]:
    """Run one measurement in a process of its own."""
    words = [sys.executable, __file__, "--task", task, "--options", json.dumps(options)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def record(folder: Path, episodes: int) -> Path:
    """Episodes of the maze that the shipped world shows, with seeds that its training never saw."""
    words = (
        f"curate record --env VizdoomMyWayHome-v1 --episodes {episodes} --steps 40 --frame-skip 2 --size 64x64 "
        f"--hold 6 --seed 90000 --no-depth --no-segmentation --out {folder}"
    )
    subprocess.run([sys.executable, "-m", "worldloom", *words.split()], check=True, capture_output=True)
    return folder


def main() -> None:
    """Print the table and the ratios."""
    cases = ["step", "video2world", "rollout", "constant", "skip"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=cases, choices=cases)
    parser.add_argument("--quick", action="store_true", help="fewer pairs, smaller networks")
    parser.add_argument("--model", default="loom-world-nano", help="trained model of the last two cases")
    parser.add_argument("--data", default="", help="its clips; by default recorded from the maze (needs vizdoom)")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--options", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        tasks = {f.__name__: f for f in (step, video2world, rollout, constant, skip)}
        print(json.dumps(tasks[args.task](**json.loads(args.options))))
        return
    import diffusers

    print(
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.machine()}; float32, medians, pairs interleaved; ratio = theirs / ours, higher is better"
    )
    quick = args.quick
    if "step" in args.cases:
        for per_frame in (True, False):
            found = apart("step", per_frame=per_frame, width=1024, blocks=4, frames=6, pairs=3 if quick else 7)
            kind = "level per frame" if per_frame else "one level"
            _line(f"denoising call, {kind}: 4 blocks of width 1024, 576 tokens, 512 of text", found)
            print(f"ratio step-{'per-frame' if per_frame else 'one-level'}: {found['ratio']:.2f} (time)", flush=True)
    if "video2world" in args.cases:
        pairs = 1 if quick else 2
        settings = (
            ("autoencoder", 96, (48, 64), 512, 2, 4),
            ("network", 16, (96, 128), 512, 4, 8),
            ("large-network", 16, (96, 128), 1024, 4, 8),
        )
        for name, channels, size, width, blocks, steps in settings:
            options = {"channels": channels, "size": size, "width": width, "blocks": blocks, "steps": steps}
            found = apart("video2world", **options, frames=17, given=5, pairs=pairs)
            _line(
                f"video2world, 17 frames of {size[0]}x{size[1]} from 5, autoencoder of {channels} channels, {blocks} "
                f"blocks of width {width}, {steps} steps, guided",
                found,
            )
            ours, theirs = found["ours"], found["theirs"]
            print(
                f"  ours: encode {found['encode'] / ours:.0%}, decode {found['decode'] / ours:.0%}; theirs: encode "
                f"{found['their_encode'] / theirs:.0%}, decode {found['their_decode'] / theirs:.0%}; rest: the network"
            )
            print(f"ratio video2world-{name}: {found['ratio']:.2f} (time)")
            print(f"ratio video2world-{name}-kept: {found['kept_ratio']:.2f} (time, start encoded before)", flush=True)
    if "rollout" in args.cases:
        for context in (8, 32):
            found = apart("rollout", context=context, steps=2, pairs=5 if quick else 15)
            _line(f"a frame at a context of {context} latent frames, 2 steps: cached, recomputed", found)
            print(f"ratio rollout-{context}: {found['ratio']:.2f} (time)", flush=True)
    if "constant" in args.cases:
        found = apart("constant", model=args.model, early=16, late=500, pairs=10 if quick else 40)
        print(
            f"a step of {args.model}: 16 frames after its start {1e3 * found['ours']:.1f} ms, 500 after "
            f"{1e3 * found['theirs']:.1f} ms; {found['frames_per_second']:.0f} frames per second"
        )
        print(f"ratio constant: {found['ratio']:.3f} (500 / 16 frames, 1 is constant)", flush=True)
    if "skip" in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            data = args.data or str(record(Path(folder) / "maze", 4))
            for threshold in (0.1, 0.2, 0.3):
                options = {"model": args.model, "data": data, "steps": 35, "method": "euler", "clips": 4}
                found = apart("skip", **options, threshold=threshold, pairs=1 if quick else 3)
                _line(f"step skipping, {args.model}, 35 Euler steps, threshold {threshold}: skipping, whole", found)
                print(
                    f"ratio skip-{threshold}: {found['ratio']:.2f} (time) at {found['psnr']:.1f} dB to the whole run, "
                    f"worst clip {found['least_psnr']:.1f}",
                    flush=True,
                )


def _line(what: str, found: dict[str, float]) -> None:
    difference = f" (largest difference {found['difference']:.1e})" if "difference" in found else ""
    print(f"{what}: ours {found['ours']:.3f} s, theirs {found['theirs']:.3f} s{difference}", flush=True)


if __name__ == "__main__":
    main()
