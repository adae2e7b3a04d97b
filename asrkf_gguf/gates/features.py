"""What the gates are trained on, in a work folder: each layer's normalised inputs, and the teacher's scores of the tokens.

One file a layer and kind, without a header: [tokens, n_embd] in F16, [tokens, KV heads] in F32. Documents are written one behind the
other, and the manifest counts those that are finished: a run that was stopped goes on behind them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

import llama_cpp
import numpy as np

from ..calibration import write_side_file
from .graph import LayerShape, session
from .teacher import Instructions, Plan, chunks_of, score_document, tokenize

LEAST_TOKENS = 1000  # of text: with fewer, ten or less are held out
_LEAST_DOCUMENT = 128


def cut_documents(model: Any, texts: Sequence[str], n_tokens: int, plan: Plan) -> list[list[int]]:
    """So many tokens, of each text the same share where it is long enough. Each document begins as the model wants a text to begin.

    Fewer where the texts have no more; ValueError if there are too few.
    """
    token_lists = sorted((tokenize(model, text[: 16 * n_tokens]) for text in texts), key=len)
    vocab = llama_cpp.llama_model_get_vocab(model)
    head = [llama_cpp.llama_vocab_bos(vocab)] if llama_cpp.llama_vocab_get_add_bos(vocab) else []
    documents: list[list[int]] = []
    left = n_tokens
    for i, tokens in enumerate(token_lists):
        tokens = tokens[: left // (len(token_lists) - i)]
        left -= len(tokens)
        size = plan.document_tokens - len(head)
        pieces = [tokens[at : at + size] for at in range(0, len(tokens), size)]
        documents += [[*head, *piece] for piece in pieces if len(piece) >= _LEAST_DOCUMENT]
    if (n := sum(map(len, documents))) < LEAST_TOKENS:
        raise ValueError(f"the texts have {n} tokens, at least {LEAST_TOKENS} are needed: give a longer --text or more --tokens")
    return documents


@dataclass(frozen=True)
class Features:
    """The work folder of one model and text."""

    folder: Path
    shapes: dict[int, LayerShape]
    documents: list[list[int]]
    plan: Plan
    model: str
    """Its fingerprint, and what else tells it from others: quantisations of one model have the same."""

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.documents))

    @property
    def token_bytes(self) -> int:
        """On disk, of one token in all layers."""
        return sum(2 * shape.n_embd + 4 * shape.n_heads_kv for shape in self.shapes.values())

    def bytes_to_write(self) -> int:
        return self.token_bytes * sum(map(len, self.documents[self.n_finished() :]))

    def input_file(self, il: int) -> Path:
        return self.folder / f"inputs-{il}.f16"

    def target_file(self, il: int) -> Path:
        return self.folder / f"targets-{il}.f32"

    def _identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(json.dumps(self.documents).encode()).hexdigest()
        return {
            "format": "asrkf-gates-features", "version": 1, "model": self.model, "text_sha256": digest, "tokens": self.n_tokens,
            "plan": asdict(self.plan), "layers": {str(il): asdict(shape) for il, shape in self.shapes.items()},
        }  # fmt: skip

    def n_finished(self) -> int:
        """Documents whose features are there; 0 if those in the folder are of another model or text."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            found = json.loads((self.folder / "manifest.json").read_text())
            n = int(found.pop("finished_documents"))
            if found == self._identity() and all(path.stat().st_size >= n_bytes for path, n_bytes in self._sizes(n).items()):
                return n
        return 0

    def _sizes(self, n_documents: int) -> dict[Path, int]:
        """Bytes of all files, with the features of so many documents."""
        n = sum(map(len, self.documents[:n_documents]))
        inputs = {self.input_file(il): 2 * n * shape.n_embd for il, shape in self.shapes.items()}
        return {**inputs, **{self.target_file(il): 4 * n * shape.n_heads_kv for il, shape in self.shapes.items()}}

    def _finish(self, n_documents: int) -> None:
        write_side_file(self.folder / "manifest.json", {**self._identity(), "finished_documents": n_documents})

    def read(self, il: int) -> tuple[np.ndarray, np.ndarray]:
        """A layer's inputs, float16 [tokens, n_embd], and targets, float32 [tokens, KV heads], in memory."""
        shape = self.shapes[il]
        inputs = np.fromfile(self.input_file(il), np.float16).reshape(-1, shape.n_embd)
        return inputs, np.fromfile(self.target_file(il), np.float32).reshape(-1, shape.n_heads_kv)

    def delete(self) -> None:
        shutil.rmtree(self.folder)

    def collect(self, model: Any, n_threads: Optional[int], progress: Callable[[int], None]) -> None:
        """Every document's features that are not there yet; progress gets the tokens that were decoded."""
        n_finished = self.n_finished()
        if not n_finished and self.folder.exists():
            self.delete()  # of another model or text
        self.folder.mkdir(parents=True, exist_ok=True)
        self._finish(n_finished)
        if n_finished == len(self.documents):
            return
        instructions = Instructions.of(model)
        with session(model, self.plan.n_ctx, n_threads) as reading, contextlib.ExitStack() as files:
            sizes = self._sizes(n_finished)
            out = {path: files.enter_context(path.open("ab", buffering=0)) for path in sizes}
            for path, n_bytes in sizes.items():
                out[path].truncate(n_bytes)  # the begin of a document that was not finished

            def write(path: Path, values: np.ndarray) -> None:
                data = np.ascontiguousarray(values).tobytes()
                if out[path].write(data) != len(data):
                    raise OSError(f"{path} cannot be written: the disk is full")

            def keep_input(il: int, x: np.ndarray) -> None:
                if il in self.shapes:
                    write(self.input_file(il), np.clip(x, -65504, 65504).astype(np.float16))

            for i, document in enumerate(self.documents[n_finished:], n_finished):
                reading.keep(0)
                reading.on_input = keep_input
                reading.decode(document, progress)
                reading.on_input = None
                scores = score_document(reading, document, list(self.shapes), instructions, self.plan.chunk_tokens, progress)
                for il, values in scores.items():
                    write(self.target_file(il), values)
                self._finish(i + 1)

    def tokens_to_decode(self, instructions: Instructions) -> int:
        """All documents, and their repetitions."""
        todo = self.documents[self.n_finished() :]
        chunks = [(document, begin, end) for document in todo for begin, end in chunks_of(len(document), self.plan.chunk_tokens)]
        return sum(map(len, todo)) + sum(len(instructions.before(document, begin)) + end - begin for document, begin, end in chunks)
