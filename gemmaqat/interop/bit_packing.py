"""Codes of 2 to 8 bits as the dense bit streams of safetensors formats, row by row.

2^(bits-1) is added to a code, and element i of a row takes the bits `i * bits` to
`(i + 1) * bits` of the row, lowest first; the row is padded with zero bits. Bytes of
compressed-tensors' int32 words and of the Gemma mobile checkpoints are both of this order.
"""

import numpy as np


def packed_bytes(length: int, bits: int) -> int:
    """Bytes of a row of `length` codes."""
    return -(-length * bits // 8)


def pack_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 `[R, packed_bytes(K, bits)]` of int8 codes `[R, K]`, each in -2^(bits-1) ..

    2^(bits-1) - 1.
    """
    rows, length = codes.shape
    raw = (codes.view(np.uint8) + np.uint8(1 << (bits - 1))) & np.uint8(2**bits - 1)
    if 8 % bits:
        streams = np.unpackbits(raw[:, :, None], axis=2, count=bits, bitorder="little")
        return np.packbits(streams.reshape(rows, -1), axis=1, bitorder="little")
    width = packed_bytes(length, bits)
    places = 8 // bits
    if length % places:
        padded = np.zeros((rows, width * places), np.uint8)
        padded[:, :length] = raw
        raw = padded
    packed = raw[:, ::places].copy()
    for place in range(1, places):
        packed |= raw[:, place::places] << np.uint8(place * bits)
    return packed


def unpack_rows(packed: np.ndarray, bits: int, length: int) -> np.ndarray:
    """int8 codes `[R, length]` of bytes `[R, at least packed_bytes(length, bits)]`."""
    rows = len(packed)
    packed = packed[:, : packed_bytes(length, bits)]
    if 8 % bits:
        streams = np.unpackbits(packed, axis=1, count=length * bits, bitorder="little")
        fields = streams.reshape(rows, length, bits)
        raw = np.packbits(fields, axis=2, bitorder="little")[:, :, 0]
    else:
        places = 8 // bits
        raw = np.empty((rows, packed.shape[1] * places), np.uint8)
        for place in range(places):
            raw[:, place::places] = packed >> np.uint8(place * bits) & np.uint8(2**bits - 1)
        raw = raw[:, :length]
    return (raw - np.uint8(1 << (bits - 1))).view(np.int8)
