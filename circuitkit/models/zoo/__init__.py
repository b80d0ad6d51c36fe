"""Two tiny trained models that ship inside the package, so that everything runs offline.

Each is an ordinary Hugging Face folder (config, tokenizer, safetensors weights) beside this file;
`MODEL_CARD.md` in the folder says what the model can do. `scripts/train_zoo.py` made them.
"""

from pathlib import Path

ZOO: tuple[str, ...] = ("tiny_gpt2", "tiny_llama")
"""The names of the embedded models."""


def zoo_path(name: str) -> Path:
    """Return the folder of an embedded model.

    Args:
        name: One of `ZOO`.

    Returns:
        The folder, ready for `from_pretrained`.

    Raises:
        ValueError: If no embedded model has that name.
    """
    if name not in ZOO:
        raise ValueError(f"unknown embedded model {name!r}; choose one of {', '.join(ZOO)}")
    return Path(__file__).parent / name
