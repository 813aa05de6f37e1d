"""The golden example of a bundle: inputs and outputs of its artifact, small enough to ship, for a self-test on the device.

Made by running the artifact in its own runtime, as a device runs it (a backend's last view: the kernels themselves).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgebuild import samples
from edgebuild.backend import Backend, Session
from edgebuild.errors import StepFailed

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Arrays: ONNX Runtime for the web differs from the one for servers by 2e-6 (measured). Logits: MLX computes in bfloat16; on a
# 4-layer Phi-3 its int4 kernels differ from the same weights in float32 by 0.2 (root mean square), 1.1 at most, at logits to 17.
ARRAYS = {"relative": 1e-3, "absolute": 1e-4}
LOGITS = {"relative": 0.05, "absolute": 0.5}
PROMPT, CONTINUATION, TOP = 24, 8, 5  # tokens
ENOUGH = 4  # tokens of a continuation that no near tie makes doubtful: then no other prompt is tried
OFFSETS = range(0, 41, 8)  # where in the golden text a prompt may begin
KEPT = 4096  # elements of an output that are kept; of a larger one every so manieth
LARGEST = 1_000_000  # elements of an input


def make(backend: Backend, model: Path) -> dict[str, Any]:
    """The golden example of the artifact at `model`, as JSON. Raises StepFailed.

    Arrays: `inputs` and `outputs` (name, dtype, shape, stride, data), every `stride`-th element in row-major order. Language
    models: `prompt`, `top` (token and logit after it), `continuation` (greedy, up to 8), whose first `certain` must match.
    """
    session = _open(backend, model)
    try:
        example = _arrays(session) if session.inputs else _tokens(backend, model, session)
        return {"edgebuild": 1, "runtime": session.runtime, **example}
    finally:
        session.close()


def hold(golden: Mapping[str, Any], backend: Backend, model: Path) -> str:
    """Run `model` on the golden example; → its runtime. Raises StepFailed where it answers otherwise."""
    session = _open(backend, model)
    try:
        if "prompt" in golden:
            _hold_tokens(golden, session)
        else:
            _hold_arrays(golden, session)
        return session.runtime
    finally:
        session.close()


def dumps(golden: Mapping[str, Any]) -> str:
    """golden.json: a line for each array, so that people can read it."""
    lines = []
    for key, value in golden.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines.append(f'  "{key}": [\n    ' + ",\n    ".join(_line(one) for one in value) + "\n  ]")
        else:
            lines.append(f'  "{key}": {_line(value)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _open(backend: Backend, model: Path) -> Session:
    return backend.open(model, list(backend.VIEWS)[-1])


def _feeds(session: Session) -> dict[str, NDArray[Any]]:
    """Seeded inputs, floats of two decimals: every language reads the same number from their text."""
    feeds = samples.golden(session.inputs)
    for name, array in feeds.items():
        if array.size > LARGEST:
            raise StepFailed(
                f"its input {name} has {array.size:,} elements, too many for a golden example; export it with smaller ones"
            )
    return {name: array.round(2) if array.dtype.kind == "f" else array for name, array in feeds.items()}


def _arrays(session: Session) -> dict[str, Any]:
    feeds = _feeds(session)
    outputs = session.infer(feeds)
    return {
        "tolerance": ARRAYS,
        "inputs": [_array(name, array, 1) for name, array in feeds.items()],
        "outputs": [_array(name, array, math.ceil(array.size / KEPT) or 1) for name, array in outputs.items()],
    }


def _array(name: str, array: NDArray[Any], stride: int) -> dict[str, Any]:
    array = np.asarray(array)
    if array.dtype.kind not in "fiub":
        raise StepFailed(f"{name} is {array.dtype}, which a golden example cannot hold; leave that output out of the model")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise StepFailed(f"{name} holds values that are not finite for a plain input: the artifact is not usable")
    flat = array.reshape(-1)[::stride]
    data = [float(str(one)) if array.dtype.kind == "f" else one.item() for one in flat]  # str: the shortest that reads back
    return {"name": name, "dtype": array.dtype.name, "shape": list(array.shape), "stride": stride, "data": data}


def _hold_arrays(golden: Mapping[str, Any], session: Session) -> None:
    feeds = {one["name"]: np.array(one["data"], dtype=one["dtype"]).reshape(one["shape"]) for one in golden["inputs"]}
    outputs = session.infer(feeds)
    for one in golden["outputs"]:
        found = outputs.get(one["name"])
        if found is None or list(found.shape) != one["shape"]:
            raise StepFailed(f"the bundle's model has no output {one['name']} of shape {one['shape']}")
        worst = _worst(found.reshape(-1)[:: one["stride"]], one["data"], golden["tolerance"])
        if not worst <= 1:
            raise StepFailed(f"the bundle's model misses its golden output {one['name']}, by {worst:.3g} times the tolerance")


def _worst(found: Any, expected: Any, tolerance: Mapping[str, float]) -> float:
    """The largest difference as a share of what is allowed, absolute + relative · |expected|."""
    wanted = np.asarray(expected, dtype=np.float64)
    allowed = tolerance["absolute"] + tolerance["relative"] * np.abs(wanted)
    return float((np.abs(np.asarray(found, dtype=np.float64) - wanted) / allowed).max(initial=0.0))


def _tokens(backend: Backend, model: Path, session: Session) -> dict[str, Any]:
    """A prompt, what follows it, and how much of that is certain: a near tie may fall otherwise on the device.

    The backend's first view finds the continuation, token by token, and one pass of the kernels settles it: MLX's int4 kernels
    run 30 tokens a second of a 4-million-parameter model on a CPU, a tenth of what the same weights do in float32.
    """
    text = samples.golden_tokens(session, OFFSETS[-1] + PROMPT)
    draft = backend.open(model, next(iter(backend.VIEWS))) if len(backend.VIEWS) > 1 else session
    prompt, tokens = _longest(draft, text)
    if draft is not session:
        draft.close()
    logits = session.logits(tokens[:-1])[len(prompt) - 1 :]
    if not np.isfinite(logits).all():
        raise StepFailed("its logits are not finite for a plain text: the artifact is not usable")
    chosen = logits.argmax(axis=-1)
    agreed = _count(chosen == tokens[len(prompt) :])
    order = np.argsort(-logits[0], kind="stable")[:TOP]
    return {
        "tolerance": LOGITS,
        "prompt": prompt.tolist(),
        "top": [{"token": int(token), "logit": float(str(logits[0][token]))} for token in order],
        "continuation": chosen[: agreed + 1].tolist(),
        "certain": min(_count(_clear(logits)), agreed + 1),
    }


def _longest(session: Session, text: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """A prompt in `text` whose greedy continuation is clear for long enough, else the longest; and it with what follows it."""
    found = []
    for offset in OFFSETS:
        tokens, count = text[offset : offset + PROMPT], 0
        while count < CONTINUATION:
            tokens, clear = _next(session, tokens)
            if not clear:
                break  # what follows it counts no more, and a pass of a large model takes many seconds
            count += 1
        found.append((count, -offset, tokens))
        if count >= ENOUGH:
            break
    *_, tokens = max(found, key=lambda one: one[:2])
    while len(tokens) < PROMPT + CONTINUATION:
        tokens, _ = _next(session, tokens)
    return tokens[:PROMPT], tokens


def _next(session: Session, tokens: NDArray[np.int32]) -> tuple[NDArray[np.int32], bool]:
    """Tokens and the likeliest after them; whether that one is clear."""
    last = session.logits(tokens)[-1]
    return np.append(tokens, last.argmax()).astype(np.int32), bool(_clear(last[None])[0])


def _clear(logits: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Logits [T, V] → [T]: whether the first token leads the second by more than the tolerance."""
    second, first = np.sort(logits, axis=-1)[:, -2:].T
    return np.asarray(first - second > LOGITS["absolute"] + LOGITS["relative"] * np.abs(first))


def _count(flags: Iterable[Any]) -> int:
    """How many are true before the first that is not."""
    return sum(1 for _ in itertools.takewhile(bool, flags))


def _hold_tokens(golden: Mapping[str, Any], session: Session) -> None:
    prompt, sure = golden["prompt"], golden["continuation"][: golden["certain"]]
    logits = session.logits(np.array([*prompt, *sure[:-1]], dtype=np.int32))[len(prompt) - 1 :]
    top, expected = zip(*((one["token"], one["logit"]) for one in golden["top"]), strict=True)
    worst = _worst(logits[0][list(top)], expected, golden["tolerance"])
    if not worst <= 1:
        raise StepFailed(f"the bundle's model misses its golden logits, by {worst:.3g} times the tolerance")
    for step, (found, token) in enumerate(zip(logits.argmax(axis=-1).tolist(), sure, strict=False)):
        if found != token:
            raise StepFailed(f"the bundle's model continues its golden prompt with token {found} at step {step + 1}, not {token}")
