"""`framework: auto` → a framework, with the reason and the runner-up. Depends on task and format, never on what is installed."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Which framework, why, and which would have been next (empty where there is none)."""

    framework: str
    reason: str
    runner_up: str = ""


def choose(framework: str, task: str, format: str) -> Choice:
    """A named framework stays; `auto` goes by the source's format. Raises ValueError where no framework takes it."""
    if framework != "auto":
        return Choice(framework=framework, reason="named by the target or its platform")
    if format == "onnx":
        return Choice(framework="onnxruntime", reason="the source is ONNX, which ONNX Runtime runs as it is")
    if format == "huggingface" and task == "text-generation":
        return Choice(framework="mlx", reason="the source is a Hugging Face language model")
    raise ValueError(f"no framework here takes a source of format {format} for {task}; name one, or give an ONNX file")
