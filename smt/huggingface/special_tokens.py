"""What ends and pads a text of a run, for ``generate``: its tokenizer knows, its configuration does not."""

from __future__ import annotations

import json
from pathlib import Path

from smt.data.tokenizer import SETTINGS_FILE, TOKENIZER_FILE, Tokenizer


def ends_of_text(folder: str | Path) -> dict[str, int]:
    """``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` of the tokenizer in a folder; nothing where there is none.

    A document begins and ends with the same token. It also pads, unless the tokenizer has a token for that.
    """
    folder = Path(folder)
    if not (folder / TOKENIZER_FILE).is_file():
        return {}
    try:
        tokenizer = Tokenizer.pretrained(folder)
    except ValueError:  # another model's tokenizer, without a token that ends a text: the model can be used without one
        return {}
    settings = folder / SETTINGS_FILE
    pad = json.loads(settings.read_text(encoding="utf-8")).get("pad_token") if settings.is_file() else None
    pad = tokenizer.token(pad["content"] if isinstance(pad, dict) else pad) if pad else None
    end = tokenizer.end_of_document
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end if pad is None else pad}
