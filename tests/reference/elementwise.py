"""Float64 transcriptions of AdamP, SGDP and diffGrad, from their papers."""

import math

import numpy as np


def cosines(g, w, eps):
    """Magnitudes of the cosines of corresponding rows."""
    norms = np.maximum(np.linalg.norm(g, axis=1), eps) * np.maximum(np.linalg.norm(w, axis=1), eps)
    return np.abs((g * w).sum(1)) / norms


def project(w, g, u, *, eps=1e-8, delta=0.1):
    """The projected update, whether it was, and how close the decision came to the threshold."""
    nearest = math.inf
    if w.ndim < 2 or not w.size:
        return u, False, nearest
    for rows in (w.shape[0], 1):
        weight, grad, update = (x.reshape(rows, -1) for x in (w, g, u))
        threshold = delta / math.sqrt(weight.shape[1])
        worst = cosines(grad, weight, eps).max()
        nearest = min(nearest, abs(worst - threshold) / threshold if threshold else worst)
        if worst < threshold:
            n = weight / (np.linalg.norm(weight, axis=1, keepdims=True) + eps)
            update = update - n * (n * update).sum(1, keepdims=True)
            return update.reshape(w.shape), True, nearest
    return u, False, nearest


class AdamP:
    """One parameter under AdamP; `projected` and `nearest` tell about the last step."""

    def __init__(self, w, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, delta=0.1,
                 wd_ratio=0.1, nesterov=False):  # fmt: skip
        self.w = np.array(w, dtype=np.float64)
        self.m, self.v, self.t = np.zeros_like(self.w), np.zeros_like(self.w), 0
        self.options = lr, betas, eps, weight_decay, delta, wd_ratio, nesterov

    def step(self, g):
        lr, (b1, b2), eps, weight_decay, delta, wd_ratio, nesterov = self.options
        g = np.asarray(g, dtype=np.float64)
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        denominator = np.sqrt(self.v) / math.sqrt(1 - b2**self.t) + eps
        u = (b1 * self.m + (1 - b1) * g if nesterov else self.m) / denominator
        u, self.projected, self.nearest = project(self.w, g, u, eps=eps, delta=delta)
        ratio = wd_ratio if self.projected else 1.0
        self.w = self.w * (1 - lr * weight_decay * ratio) - lr / (1 - b1**self.t) * u


class SGDP:
    """One parameter under SGDP."""

    def __init__(self, w, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False,
                 eps=1e-8, delta=0.1, wd_ratio=0.1):  # fmt: skip
        self.w = np.array(w, dtype=np.float64)
        self.b = np.zeros_like(self.w)
        self.options = lr, momentum, dampening, weight_decay, nesterov, eps, delta, wd_ratio

    def step(self, g):
        lr, momentum, dampening, weight_decay, nesterov, eps, delta, wd_ratio = self.options
        g = np.asarray(g, dtype=np.float64)
        self.b = momentum * self.b + (1 - dampening) * g
        u = g + momentum * self.b if nesterov else self.b
        u, self.projected, self.nearest = project(self.w, g, u, eps=eps, delta=delta)
        ratio = wd_ratio if self.projected else 1.0
        self.w = self.w * (1 - lr * weight_decay * ratio / (1 - momentum)) - lr * u


class DiffGrad:
    """One parameter under diffGrad.

    `variant` may also be ``"adam"`` (no friction, eps under the root, as the paper's notebooks
    have it) and ``"bug"`` (the earlier gradient is an alias of the present one from the second
    step on, as in the original's first version).
    """

    def __init__(self, w, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, variant="abs",
                 reference=False):  # fmt: skip
        self.w = np.array(w, dtype=np.float64)
        self.m, self.v, self.previous = (np.zeros_like(self.w) for _ in range(3))
        self.t = 0
        self.options = lr, betas, eps, weight_decay, variant, reference

    def step(self, g):
        lr, (b1, b2), eps, weight_decay, variant, reference = self.options
        g = np.asarray(g, dtype=np.float64) + weight_decay * self.w
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        d = self.previous - g
        if variant == "bug" and self.t > 1:
            d = np.zeros_like(d)
        friction = {
            "abs": lambda: 1 / (1 + np.exp(-np.abs(d))),
            "bug": lambda: 1 / (1 + np.exp(-np.abs(d))),
            "signed": lambda: 1 / (1 + np.exp(-d)),
            "wide": lambda: 9 / (1 + np.exp(-0.5 * np.abs(d))) - 4,
            "adam": lambda: np.ones_like(d),
        }[variant]()
        self.previous = g.copy()
        c1, c2 = 1 - b1**self.t, 1 - b2**self.t
        if variant == "adam":
            self.w = self.w - lr * (self.m / c1) / np.sqrt(self.v / c2 + eps)
        elif reference:
            a = lr * math.sqrt(c2) / c1
            self.w = self.w - a * friction * self.m / (np.sqrt(self.v) + eps)
        else:
            self.w = self.w - lr * friction * (self.m / c1) / (np.sqrt(self.v / c2) + eps)
