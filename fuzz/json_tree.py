"""Mutants of JSON that are JSON again: a member more, one less, a value in another's place."""

from __future__ import annotations

import json
import random
from typing import Any

_LEAVES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 255, 256, 65535, 65536, 2**32, 2**64 - 1, 2**64, 10**30, 0.5, -0.0, 1e300,
    "", "a", "\0", "é", "𝄞", "on", "1", "Off", "Shared", "file:///x", "/x",
    "192.168.0.1", "12:34:56:78:90:ab",
    [], {}, [[]], [None], [0, 0], {"": None},
)  # fmt: skip


def mutate_json(data: bytes, noise: random.Random, names: list[str]) -> bytes:
    """Change one place of the document in `data`; what is no JSON stays as it is."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return data
    places = _places(document)
    if not places:
        return json.dumps(noise.choice(_LEAVES)).encode()
    holder, key = noise.choice(places)
    match noise.randrange(6):
        case 0:
            del holder[key]
        case 1:
            other, other_key = noise.choice(places)
            holder[key] = json.loads(json.dumps(other[other_key]))
        case 2 if isinstance(holder, dict):
            holder[noise.choice(names)] = holder.pop(key)
        case 3 if isinstance(holder, dict):
            holder[noise.choice(names)] = noise.choice(_LEAVES)
        case 4 if isinstance(holder[key], list):
            holder[key] = holder[key] * 2
        case _:
            holder[key] = noise.choice(_LEAVES)
    try:
        return json.dumps(document, ensure_ascii=noise.random() < 0.5).encode(errors="surrogatepass")
    except (ValueError, RecursionError):
        return data


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Return each place in `document` as the dict or list that holds it, and the key or index."""
    found: list[tuple[Any, Any]] = []
    waiting = [document]
    while waiting:
        holder = waiting.pop()
        if isinstance(holder, dict):
            keys: list[Any] = list(holder)
        elif isinstance(holder, list):
            keys = list(range(len(holder)))
        else:
            continue
        found += [(holder, key) for key in keys]
        waiting += [holder[key] for key in keys]
    return found
