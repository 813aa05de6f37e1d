"""Trains the language example model, a small real Phi-3, on the text of ``targets/data/make_text.py``.

    pip install torch==2.13.0 transformers==5.23.0 sentencepiece protobuf scikit-learn onnx onnxscript
    python targets/models/train_tiny_phi3.py            # writes targets/models/tiny-phi3
    python targets/models/train_tiny_phi3.py --check    # retrains elsewhere and compares the perplexities

The steps, the seeds and the thread count are fixed, so one machine gives the same weights each time;
other processors round differently and give slightly different ones, hence the tolerance of ``--check``.
On a machine that does other work too, ``OMP_WAIT_POLICY=passive`` in the environment saves much time.
"""

import argparse
import importlib.util
import io
import itertools
import json
import math
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import sentencepiece
import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, GenerationConfig, Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerBase

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "data"
MODEL = HERE / "tiny-phi3"

PIECES = 2043
ADDED_TOKENS = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
END_OF_TEXT, END_OF_TURN = PIECES, PIECES + 3
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

TEXT_SEED = 100
ROWS_SEED = 101
TOKENIZER_DOCUMENTS = 20_000
ROWS = 10_000
PAGES = 4_000
PAGE_DOCUMENTS = 8
WEIGHT_SEED = 3
STEPS = 1400
WARM_UP = 40
STEP_TOKENS = 1024
WINDOW = 512
MUON_RATE = 0.02
ADAM_RATE = 3e-3
EMBEDDING_RATE = 2e-2
WEIGHT_DECAY = 0.05
THREADS = 2

GOLDEN_SEED = 2_000_003
GOLDEN_TOKENS = 64
TOLERANCE = 0.02


def load_text_module() -> Any:
    """``make_text.py`` as a module: the data folder is no package."""
    spec = importlib.util.spec_from_file_location("make_text", DATA / "make_text.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_text"] = module
    spec.loader.exec_module(module)
    return module


def build_tokenizer(text: str, folder: Path) -> PreTrainedTokenizerBase:
    """Train SentencePiece BPE on the text and write the tokenizer files into the folder.

    The pieces have the ids 0..2042 and the added tokens 2043..2047, so each of the model's logits is a token.
    """
    model = io.BytesIO()
    # An iterator and a writer instead of file names: SentencePiece keeps the names in the model.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_writer=model, model_type="bpe", vocab_size=PIECES,
        byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, add_dummy_prefix=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        num_threads=1, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokens = dict(enumerate(("<unk>", "<s>", "</s>"))) | dict(enumerate(ADDED_TOKENS, start=PIECES))
    # As in Phi-3, the chat tokens take the white space after them along; llama.cpp does the same by the model's name.
    flags = {"lstrip": False, "normalized": False, "single_word": False, "special": True}
    settings = {
        "tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": False, "add_eos_token": False,
        "bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>", "pad_token": "<|endoftext|>",
        "model_max_length": 2048, "chat_template": CHAT_TEMPLATE,
        "added_tokens_decoder": {str(index): {"content": token, "rstrip": token in ADDED_TOKENS[1:], **flags} for index, token in tokens.items()},
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """The token ids of a text, int64 [T], without special tokens around it."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def training_rows(text_module: Any, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """A stream, int64 [T], of rows of words that are said twice."""
    draw = text_module.Draw(ROWS_SEED)
    return encode(tokenizer, "\n".join(text_module.make_row(draw) for _ in range(ROWS)))


def training_pages(text_module: Any, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """A stream, int64 [T], of pages of plain documents and of conversations, each ended by <|endoftext|>."""
    draw = text_module.Draw(TEXT_SEED)
    pages = []
    for _ in range(PAGES):
        plain = "\n\n".join(text_module.make_document(draw) for _ in range(PAGE_DOCUMENTS)) + "\n"
        pages.append(encode(tokenizer, plain + ADDED_TOKENS[0]))
        pages.append(encode(tokenizer, text_module.make_chat(draw) + ADDED_TOKENS[0]))
        pages += encode_parts(tokenizer, text_module.make_chat(draw) + ADDED_TOKENS[0])
    return torch.cat(pages)


def encode_parts(tokenizer: PreTrainedTokenizerBase, text: str) -> list[Tensor]:
    """The ids as llama.cpp gives them: each part after an added token starts with a space of its own."""
    parts = (part.strip() for part in re.split(f"({'|'.join(map(re.escape, ADDED_TOKENS))})", text))
    return [encode(tokenizer, part) for part in parts if part]


def lesson(step: int) -> tuple[bool, int]:
    """Whether a step reads rows of words or pages, and the length of its windows in tokens.

    The rows come first: they teach copying in some hundred steps, and pages alone take many more.
    """
    if step < 200:
        return True, 64
    return False, 256 if step < 1000 else WINDOW


def build_model() -> Phi3ForCausalLM:
    """A Phi-3 of 4.2 million parameters with random weights."""
    config = Phi3Config(
        vocab_size=PIECES + len(ADDED_TOKENS), hidden_size=256, intermediate_size=768, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        original_max_position_embeddings=2048, sliding_window=None, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=END_OF_TEXT, pad_token_id=END_OF_TEXT,
    )  # fmt: skip
    torch.manual_seed(WEIGHT_SEED)
    model = Phi3ForCausalLM(config)
    # Large embeddings and silent layers: otherwise the layers drown the tokens, and the model never learns to copy names.
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[END_OF_TEXT, END_OF_TURN], pad_token_id=END_OF_TEXT)
    return model


def rate_factor(step: int) -> float:
    """The share of the full learning rate: it warms up and then falls to zero in a straight line."""
    return min((step + 1) / WARM_UP, (STEPS - step) / (STEPS - WARM_UP))


def train(model: Phi3ForCausalLM, rows: Tensor, pages: Tensor) -> None:
    """Muon for the matrices inside the layers and AdamW for the rest, over random windows of the two streams."""
    layers = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    embedding = [model.model.embed_tokens.weight]
    special = {id(parameter) for parameter in layers + embedding}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in special]
    groups = [{"params": embedding, "lr": EMBEDDING_RATE}, {"params": rest, "lr": ADAM_RATE}]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(layers, lr=MUON_RATE, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor) for optimizer in optimizers]
    model.train()
    begin = time.monotonic()
    for step in range(STEPS):
        copying, window = lesson(step)
        tokens = rows if copying else pages
        starts = torch.randint(len(tokens) - window, (STEP_TOKENS // window,)).tolist()
        batch = torch.stack([tokens[start : start + window + 1] for start in starts])
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}/{STEPS} loss {loss.item():.3f} after {time.monotonic() - begin:.0f} s", flush=True)
    model.eval()


def perplexity(folder: Path) -> float:
    """Of a saved model on ``eval.txt``, in float32, in windows of 512 tokens that do not overlap."""
    model = Phi3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = encode(AutoTokenizer.from_pretrained(folder), (DATA / "eval.txt").read_text(encoding="utf-8"))
    total = 0.0
    for start in range(0, len(tokens) - 1, WINDOW):
        window = tokens[start : start + WINDOW + 1]
        with torch.no_grad():
            logits = model(input_ids=window[None, :-1], use_cache=False).logits[0]
        total += functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return math.exp(total / (len(tokens) - 1))


def golden_text(text_module: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """A text from a seed that the training does not use, which ends with a punctuation mark as its 64th token."""
    for seed in itertools.count(GOLDEN_SEED):
        text: str = text_module.make_text(seed, 10)
        for match in re.finditer(r"[.,?]", text):
            if len(encode(tokenizer, text[: match.end()])) == GOLDEN_TOKENS:
                return text[: match.end()]
    raise AssertionError("the seeds do not end")


def write_golden(text_module: Any, folder: Path) -> None:
    """Write ``golden.safetensors``: what transformers computes for a fixed text.

    ``token_ids`` int32 [64]; ``logits`` float16 [64, 2048], computed in float32 from the saved weights;
    metadata ``text`` (its tokenisation without special tokens is ``token_ids``) and ``made_by``.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Phi3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = golden_text(text_module, tokenizer)
    token_ids = encode(tokenizer, text)
    with torch.no_grad():
        logits = model(input_ids=token_ids[None], use_cache=False).logits[0]
    if not torch.isfinite(logits.half()).all():
        raise ValueError("a logit is too large for float16")
    path = folder / "golden.safetensors"
    versions = f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"
    tensors = {"token_ids": token_ids.to(torch.int32), "logits": logits.half()}
    safetensors.torch.save_file(tensors, path, metadata={"text": text, "made_by": versions})


def make(folder: Path) -> float:
    """Train, write the whole model folder, and return its perplexity."""
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    text_module = load_text_module()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        tokenizer = build_tokenizer(text_module.make_text(TEXT_SEED, TOKENIZER_DOCUMENTS), work)
        rows, pages = training_rows(text_module, tokenizer), training_pages(text_module, tokenizer)
        model = build_model()
        print(f"{model.num_parameters():,} parameters; tokens: {len(rows):,} in rows, {len(pages):,} in pages", flush=True)
        train(model, rows, pages)
        model.to(torch.bfloat16).save_pretrained(work)
        write_golden(text_module, work)
        result = perplexity(work)
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(work.iterdir()):
            shutil.copyfile(path, folder / path.name)
            (folder / path.name).chmod(0o644)
    print(f"perplexity {result:.4f} on eval.txt")
    return result


def check() -> int:
    """0 where a newly trained model has the perplexity of the committed one, within the tolerance."""
    committed = perplexity(MODEL)
    with tempfile.TemporaryDirectory() as name:
        trained = make(Path(name))
    difference = abs(trained / committed - 1)
    print(f"committed {committed:.4f}, retrained {trained:.4f}: {difference:.2%} apart (at most {TOLERANCE:.0%})")
    return int(difference > TOLERANCE)


def main() -> int:
    """Train the model, or check the committed one."""
    parser = argparse.ArgumentParser(description="Train the tiny Phi-3 example model.")
    parser.add_argument("--out", type=Path, default=MODEL, help="model folder to write (default: tiny-phi3 beside this script)")
    parser.add_argument(
        "--check",
        action="store_true",
        help="retrain into a temporary folder; exit 1 where the perplexity differs by more than 2 %%",
    )
    arguments = parser.parse_args()
    if arguments.check:
        return check()
    make(arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
