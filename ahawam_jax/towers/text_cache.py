"""Text tokens of instructions, computed once: the tokenizer, and a folder with one file per distinct prompt.

The files are those of the release, sha256(prompt).t5_len{length}.wan22ti2v5b.pt, each a torch file of `context`
[length, X] bfloat16 and `mask` [length] bool, true for real tokens. `encoder.json` beside them says which encoder
wrote them; `ahawam encode-text` does.
"""

import dataclasses
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ftfy
import jax.numpy as jnp
import numpy as np
import tokenizers

from ahawam_jax.towers.text_encoder import TextEncoderConfig
from ahawam_jax.weights.convert import digest
from ahawam_jax.weights.tensors import Tensor
from ahawam_jax.weights.torch_file import read_torch, write_torch
from data_pipelines.disk import whole_file
from data_pipelines.files import disguised, read_json
from data_pipelines.ownership import owned
from data_pipelines.paths import local_path

PROMPT = "A video recorded from a robot's point of view executing the following instruction: {task}"
END, PAD = "</s>", "<pad>"


def prompt(instruction: str) -> str:
    """The sentence the text encoder reads for an instruction."""
    return PROMPT.format(task=instruction)


# --------------------------------------------------------------------------------------------------- tokenizer
def clean(text: str) -> str:
    """Repairs broken encodings and HTML entities and leaves single spaces only, as Wan does."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))  # twice: entities are often escaped themselves
    return " ".join(text.split())


class Tokenizer:
    """umT5's sentence pieces, read from tokenizer.json or the folder that holds it.

    digest: sha256 of the file. Raises FileNotFoundError without the file, ValueError if it is another tokenizer.
    """

    def __init__(self, path: str | Path, length: int) -> None:
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist; expected the tokenizer.json of google/umt5-xxl, which the folder "
                "google/umt5-xxl of Wan2.2-TI2V-5B holds, too."
            )
        content = file.read_bytes()
        try:
            self._model = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing narrower
            found = disguised(file, text=True) or (
                f"is not a readable tokenizer ({error}); copy the tokenizer.json of google/umt5-xxl again"
            )
            raise ValueError(f"{file} {found}.") from error
        self._model.no_truncation()
        self._model.no_padding()
        self._end = self._model.token_to_id(END)
        if self._model.token_to_id(PAD) != 0 or self._model.encode("").ids[-1:] != [self._end]:
            raise ValueError(
                f"{file} is not umT5's tokenizer: expected {PAD} to have id 0 and every text to end with {END}; use "
                "the tokenizer.json of google/umt5-xxl."
            )
        self.digest = hashlib.sha256(content).hexdigest()
        self.length = length

    def sizes(self, prompts: Sequence[str]) -> list[int]:
        """Number of tokens of every prompt before any is cut, the end token included."""
        return [len(encoding.ids) for encoding in self._encode(prompts)]

    def __call__(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Prompts -> ids [n, length] int32, padded with 0, and mask [n, length] bool, true for tokens.

        A longer prompt loses its tail; its last token is the end token all the same.
        """
        ids = np.zeros((len(prompts), self.length), np.int32)
        mask = np.zeros(ids.shape, bool)
        for row, encoding in enumerate(self._encode(prompts)):
            kept = [*encoding.ids[:-1][: self.length - 1], self._end]
            ids[row, : len(kept)], mask[row, : len(kept)] = kept, True
        return ids, mask

    def _encode(self, prompts: Sequence[str]) -> list[tokenizers.Encoding]:
        return self._model.encode_batch([clean(text) for text in prompts])


# ------------------------------------------------------------------------------------------------------- cache
def entry_path(folder: str | Path, prompt: str, length: int) -> Path:
    """Where the tokens of a prompt lie."""
    return Path(folder) / f"{hashlib.sha256(prompt.encode()).hexdigest()}.t5_len{length}.wan22ti2v5b.pt"


@dataclasses.dataclass(frozen=True)
class Entry:
    """Tokens of one prompt, which stay in their file until they are read."""

    tokens: Tensor  # [length, X]
    mask: np.ndarray  # [length] bool, true for real tokens

    def read(self) -> np.ndarray:
        """Tokens [length, X] as stored, padding rows zeroed; of the file, only the others are read."""
        tokens = np.zeros(self.tokens.shape, self.tokens.dtype)
        tokens[self.mask] = np.asarray(self.tokens)[self.mask]
        return tokens


def open_entry(folder: str | Path, prompt: str, length: int) -> Entry:
    """The tokens of a prompt in the cache.

    Raises FileNotFoundError where the prompt was never encoded, ValueError if its file is damaged.
    """
    path = entry_path(folder, prompt, length)
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no text tokens of length {length} for the prompt {prompt!r} ({path.name}); write them with "
            f"ahawam encode-text --cache {folder} --length {length} and --dataset or --prompt."
        )
    entry = read_torch(path)
    if not isinstance(entry, Mapping) or not all(isinstance(entry.get(name), Tensor) for name in ("context", "mask")):
        raise ValueError(f"{path} must hold context and mask; remove it and encode the prompt {prompt!r} again.")
    tokens, mask = entry["context"], entry["mask"]
    if len(tokens.shape) != 2 or tokens.shape[0] != length or mask.shape != (length,) or mask.dtype != bool:
        raise ValueError(
            f"{path} holds context {list(tokens.shape)} and mask {list(mask.shape)} {mask.dtype}, expected "
            f"[{length}, X] and [{length}] bool; remove it and encode the prompt {prompt!r} again."
        )
    found = Entry(tokens, np.array(mask))
    if not np.isfinite(found.read()).all():
        raise ValueError(f"{path} holds NaN or infinity; remove it and encode the prompt {prompt!r} again.")
    return found


def write_entry(folder: str | Path, prompt: str, tokens: np.ndarray, mask: np.ndarray) -> None:
    """Writes tokens [length, X] float and mask [length] bool of a prompt; the file appears whole or not at all.

    Raises ValueError if they are not finite in bfloat16.
    """
    tokens = np.asarray(tokens).astype(jnp.bfloat16)
    if not np.isfinite(tokens.astype(np.float32)).all():
        raise ValueError(
            f"The encoder returned NaN or infinity for the prompt {prompt!r}; copy its weights again."
        )
    write_torch(entry_path(folder, prompt, len(mask)), {"context": tokens, "mask": np.asarray(mask, bool)})


def fingerprint(config: TextEncoderConfig, params: Any, tokenizer: Tokenizer) -> dict[str, str]:
    """What tells one encoder from another: its sizes, a hash of all weights, its tokenizer."""
    sizes = json.dumps(dataclasses.asdict(config))
    return {"sizes": sizes, "weights": digest(params), "tokenizer": tokenizer.digest}


def claim(folder: str | Path, mark: Mapping[str, str]) -> None:
    """Makes the folder, or checks that it is, the cache of the encoder with this fingerprint.

    Raises ValueError if its entries come from another encoder, or from nobody knows which.
    """
    path = local_path(folder) / "encoder.json"
    with owned(folder, path.name, wait=True):  # several jobs may start at once
        _claim(path, mark)


def _claim(path: Path, mark: Mapping[str, str]) -> None:
    folder = path.parent
    if path.is_file():
        before = read_json(path, ValueError, "write to another folder")
        other = sorted(key for key in {*before, *mark} if before.get(key) != mark.get(key))
        if other:
            raise ValueError(
                f"{folder} holds text tokens of another encoder: {', '.join(other)} in {path.name} differ. Entries of "
                "two encoders must not mix; write to another folder, or use the weights this one was written with."
            )
        return
    if any(folder.glob("*.pt")):
        raise ValueError(
            f"{folder} has entries but no encoder.json, so nobody knows which encoder wrote them; such a cache can be "
            "read, not extended: write to another folder."
        )
    with whole_file(path) as partial:
        partial.write_text(json.dumps(dict(mark), indent=1))


@dataclasses.dataclass(frozen=True)
class CachedText:
    """The text tower that reads a cache."""

    folder: str | Path
    dim: int  # X, the width that the model reads
    length: int
    _opened: dict[str, Entry] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    dtype = np.dtype(jnp.bfloat16)

    def tokens(self, instruction: str) -> tuple[np.ndarray, np.ndarray]:
        """One instruction -> tokens [K, X] as stored (bfloat16), zero after its last token, and mask [K] bool.

        The mask is all true: the released model was trained to read the zero rows as well. Where the tokens lie is
        remembered, so that asking again costs no more than copying them.
        """
        entry = self._opened.get(instruction)
        if entry is None:
            entry = open_entry(self.folder, prompt(instruction), self.length)
            if entry.tokens.shape[1] != self.dim:
                raise ValueError(
                    f"{self.folder} has text tokens of width {entry.tokens.shape[1]}, the model reads {self.dim} "
                    "(config.model.text_dim); encode the instructions with the encoder the model was trained with."
                )
            self._opened[instruction] = entry
        return entry.read(), np.ones_like(entry.mask)
