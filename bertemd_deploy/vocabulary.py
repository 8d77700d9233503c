"""One vocabulary's embedding rows for another's tokens: matched by token text, special tokens by their role.

A student that starts from a checkpoint reads the teacher's tokens, so row k of its word embedding must be that of the
teacher's token k, wherever the checkpoint's own tokenizer has it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from bertemd_deploy.errors import ModelError
from bertemd_deploy.handout import SPECIAL_TOKENS

LEAST_SHARE = 0.99
_EXAMPLES = 5


def match_rows(
    teacher: Mapping[str, int], checkpoint: Mapping[str, int], *, rows: int, where: str
) -> tuple[NDArray[np.int64], int]:
    """Return, for every id of the teacher, the checkpoint's id of the same token, and how many of its tokens have one.

    Tokens without a partner, and ids that no token has, take the checkpoint's unknown token.

    Args:
        teacher: the teacher's tokens and their ids.
        checkpoint: the checkpoint's.
        rows: of the teacher's word embedding, at least its highest id plus one.
        where: the checkpoint, for the message.

    Returns:
        (rows,) int64 ids of the checkpoint, and the number of matched tokens.

    Raises:
        ModelError: fewer than 99% of the teacher's tokens have a partner, or one is needed and nothing is unknown.
    """
    alike = {token: names for names in SPECIAL_TOKENS.values() for token in names}
    found: dict[int, int] = {}
    lacking = []
    for token, at in teacher.items():
        partner = next((name for name in (token, *alike.get(token, ())) if name in checkpoint), None)
        if partner is None:
            lacking.append(token)
        else:
            found[at] = checkpoint[partner]
    share = len(found) / len(teacher)
    if share < LEAST_SHARE:
        named = ", ".join(repr(token) for token in sorted(lacking, key=teacher.__getitem__)[:_EXAMPLES])
        raise ModelError(
            f"{where}: its tokenizer has {len(found):,} of the teacher's {len(teacher):,} tokens ({share:.1%}; at least "
            f"{LEAST_SHARE:.0%} is needed); it lacks {named}{', …' if len(lacking) > _EXAMPLES else ''}. Start from teacher "
            "layers, or from a checkpoint that shares the teacher's vocabulary."
        )
    unknown = next((checkpoint[name] for name in SPECIAL_TOKENS["unk_token"] if name in checkpoint), None)
    if unknown is None and len(found) < rows:
        raise ModelError(
            f"{where}: {rows - len(found):,} of the teacher's ids have no token in its tokenizer, and it has no unknown "
            "token to stand for them. Start from teacher layers."
        )
    matched = np.full(rows, unknown or 0, dtype=np.int64)
    matched[list(found)] = list(found.values())
    return matched, len(found)
