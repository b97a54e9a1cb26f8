"""Users' own networks for tests, among them one that breaks the rules."""

import os

import torch
from torch import nn


def different_everywhere(image_shape, way):
    """Draws from something other than torch's seeded state: every process gets another network."""
    torch.manual_seed(os.getpid())
    return nn.Sequential(nn.Flatten(), nn.Linear(784, way))


def tied(image_shape, way):
    """Two layers that share one weight."""
    first, second = nn.Linear(16, 16), nn.Linear(16, 16)
    second.weight = first.weight
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 16), first, nn.Tanh(), second, nn.Linear(16, way))


class OnceOnly(torch.autograd.Function):
    """x^2, whose backward pass cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient

    generate_vmap_rule = True


class _Breaks(nn.Module):
    """Divides by zero after some calls: a defect of the user's that shows in the middle of a run."""

    def __init__(self, way):
        super().__init__()
        self.layer = nn.Sequential(nn.Flatten(), nn.Linear(784, way))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x) if self.calls <= 10 else 1 / 0


def breaks(image_shape, way):
    return _Breaks(way)
