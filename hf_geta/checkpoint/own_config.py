"""A config that one module holds: sizes of its own, and how attention runs as the model's config has it.

Some modules read their sizes from the model's config while they run. Once their layers have sizes of their own, so must
they; what `set_attn_implementation` changes afterwards still has to reach them.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

ATTENTION = "_attn_implementation_internal"
SHARED = "_shared"  # the config that a copy was made from


def own_config(config: Any) -> Any:
    """A copy of a config, whose sizes may be changed; `config` itself if it is such a copy already."""
    if SHARED in vars(config):
        return config
    own = copy.copy(config)
    if ATTENTION in vars(config):
        del vars(own)[ATTENTION]
        vars(own)[SHARED] = config
        kind: Any = type(config)
        own.__class__ = _class_of(kind)
    return own


@functools.cache
def _class_of(kind: Any) -> Any:
    """The class of copies of configs of a kind; since no module has it, the copies say how they are made."""
    attention = property(
        lambda self: getattr(vars(self)[SHARED], ATTENTION),
        lambda self, value: setattr(vars(self)[SHARED], ATTENTION, value),
    )
    return type(kind.__name__, (kind,), {ATTENTION: attention, "__reduce_ex__": _reduce})


def _reduce(own: Any, protocol: int) -> tuple[Any, ...]:
    return _empty, (type(own).__bases__[0],), vars(own)


def _empty(kind: type) -> Any:
    return object.__new__(_class_of(kind))
