"""The alphabet of array shapes and the aliases that recur in signatures.

One letter, one meaning, in annotations, einsum strings and comments:

    B batch          T query length     S key length      D embed width     F hidden width
    N query heads    K key/value heads  G heads per K     H head size       E experts
    V vocabulary     L layers           P per-layer width M rows (tokens)   C tiles
"""

from typing import Any

from jaxtyping import Array, Bool, Float, Int

Tokens = Int[Array, "B T"]
Positions = Int[Array, "B T"]  # -1 marks padding: never attended to, never cached
SegmentIds = Int[Array, "B T"]
Activations = Float[Array, "B T D"]
Logits = Float[Array, "B T V"]
AttentionMask = Bool[Array, "B T S"]

# A float array, or any object that brings `contract`, `take`, `ragged_contract`, `T` and `shape`
# of its own (a PackedTensor, a low-rank sum).
Weight = Any

# A tree of parameters: an `nnx.State`, a nested dict, or any other pytree.
Params = Any

# A leaf of a dataclass that is a pytree: an array, its abstract shape, a sharding, ... The comment
# beside the field gives dtype and shape.
Leaf = Any
