"""Float64 transcriptions of the quantizer and of its random numbers, from their definitions."""

import numpy as np

M0, M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
W0, W1 = 0x9E3779B9, 0xBB67AE85
LOW = np.uint64(0xFFFFFFFF)


def philox4x32(counters, key):
    """Random123's Philox4x32-10 of many counters (uint64 array [n, 4], 32 bits each)."""
    c = [counters[:, i].astype(np.uint64) for i in range(4)]
    k0, k1 = key
    for _ in range(10):
        p0, p1 = M0 * c[0], M1 * c[2]
        c = [
            (p1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k0),
            p1 & LOW,
            (p0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k1),
            p0 & LOW,
        ]
        k0, k1 = (k0 + W0) & 0xFFFFFFFF, (k1 + W1) & 0xFFFFFFFF
    return np.stack(c, axis=1)


def dithers(count, seed, stream=0, tensor_id=0, step=0):
    """The 16-bit dithers of elements 0 to count - 1."""
    mixed = seed ^ ((stream * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF)
    e = np.arange(count, dtype=np.uint64)
    index = (e // np.uint64(256)) * np.uint64(32) + e % np.uint64(32)
    counters = np.zeros((count, 4), dtype=np.uint64)
    counters[:, 0], counters[:, 1] = index & LOW, index >> np.uint64(32)
    counters[:, 2], counters[:, 3] = tensor_id, step
    words = philox4x32(counters, (mixed & 0xFFFFFFFF, mixed >> 32))
    half = ((e % np.uint64(256)) // np.uint64(32)).astype(np.int64)
    word = words[np.arange(count), half // 2]
    return ((word >> (np.uint64(16) * (half % 2).astype(np.uint64))) & np.uint64(0xFFFF)).astype(
        np.int64
    )


def grid(group, bits, symmetric):
    """Scale, zero point and code limits of one group."""
    low, high = min(group.min(initial=0.0), 0.0), max(group.max(initial=0.0), 0.0)
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = max(high, -low) / top
        return (scale if scale > 0 else 1.0), 0, -top, top
    top = 2**bits - 1
    scale = (high - low) / top
    scale = scale if scale > 0 else 1.0
    return scale, int(np.clip(np.rint(-low / scale), 0, top)), 0, top


def quantize(x, bits, group_size, symmetric, dither=None):
    """Codes, scales, zero points, and each code's distance from where it would change."""
    x = np.asarray(x, dtype=np.float64).ravel()
    codes, scales, zeros, margins = [], [], [], []
    for start in range(0, x.size, group_size):
        group = x[start : start + group_size]
        scale, zero, low, high = grid(group, bits, symmetric)
        steps = group / scale
        if dither is None:
            code = np.rint(steps)
            margin = np.abs(np.abs(steps - np.floor(steps)) - 0.5)
        else:
            threshold = 1 - dither[start : start + group_size] / 65536
            fraction = steps - np.floor(steps)
            code = np.floor(steps) + (fraction >= threshold)
            margin = np.minimum(np.abs(fraction - threshold), np.minimum(fraction, 1 - fraction))
        codes.append(np.clip(code + zero, low, high))
        scales.append(scale)
        zeros.append(zero)
        margins.append(margin)
    join = np.concatenate if codes else lambda _: np.zeros(0)
    return join(codes), np.array(scales), np.array(zeros), join(margins)
