"""Float64 transcription of Adafactor, in a subspace or not, from sections 3 to 8 of its paper."""

import math

import numpy as np


class Adafactor:
    """One parameter; NaN elements of a projected gradient count as absent."""

    def __init__(self, w, *, lr=None, eps=(1e-30, 1e-3), clip_threshold=1.0, decay_rate=-0.8,
                 beta1=None, weight_decay=0.0, scale_parameter=True, relative_step=True,
                 warmup_init=False, maximize=False, scale=1.0):  # fmt: skip
        self.w = np.array(w, dtype=np.float64)
        self.lr, self.eps, self.d, self.c, self.beta1 = lr, eps, clip_threshold, decay_rate, beta1
        self.weight_decay, self.maximize, self.scale = weight_decay, maximize, scale
        self.by_size, self.relative, self.warm = scale_parameter, relative_step, warmup_init
        self.t = self.start = 0
        self.row = self.col = self.v = self.e = 0.0

    def restart(self):
        """What a reset of the moments before the next step does."""
        self.row = self.col = self.v = self.e = 0.0
        self.start = self.t

    def rate(self):
        """Of the step that is being taken."""
        rate = 1.0 if self.lr is None else self.lr
        if self.relative:
            rate *= min(1e-6 * self.t if self.warm else 1e-2, 1 / math.sqrt(self.t))
        return rate * max(self.eps[1], rms(self.w)) if self.by_size else rate

    def direction(self, r):
        """The gradient over the root of its estimated second moment, clipped."""
        beta2 = 1 - (self.t - self.start) ** self.c
        u = np.where(np.isnan(r), np.nan, r**2 + self.eps[0])
        if r.ndim < 2:
            self.v = np.where(np.isnan(u), self.v, beta2 * self.v + (1 - beta2) * u)
            x = r / np.sqrt(self.v)
        else:
            self.row = average(self.row, np.nanmean(u, axis=-1), beta2)
            self.col = average(self.col, np.nanmean(u, axis=-2), beta2)
            shares = self.row / self.row.mean(axis=-1, keepdims=True)
            x = r / np.sqrt(shares[..., :, None] * self.col[..., None, :])
        return np.nan_to_num(x) / max(1.0, rms(np.nan_to_num(x)) / self.d)

    def step(self, g, left=None, right=None):
        """With bases, in the subspace: `left` stands on the rows, `right` on the columns."""
        g = np.asarray(g, dtype=np.float64) * (-1 if self.maximize else 1)
        self.t += 1
        r = g if left is None else left.T @ g
        r = r if right is None else r @ right
        rate = self.rate()
        x = rate * self.direction(r)
        if self.beta1 is not None:
            self.e = x = self.beta1 * self.e + (1 - self.beta1) * x
        x = x if left is None else left @ x
        x = x if right is None else x @ right.T
        self.w = self.w - self.weight_decay * rate * self.w - self.scale * x


def average(old, new, beta2):
    """The moving average of what is there."""
    return np.where(np.isnan(new), old, beta2 * old + (1 - beta2) * new)


def rms(x):
    """The root of the mean square."""
    return float(np.sqrt(np.mean(np.square(x))))
