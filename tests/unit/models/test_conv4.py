"""Conv-4 against the reference's layers, written down one by one."""

import torch
from torch.nn import functional as F

from imaml_dist.models.conv4 import Conv4


def reference(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The strided form as the reference code has it: with a row and a column of zeros behind 7x7."""
    for index in range(4):
        names = [f"blocks.{index}.{part}" for part in ("0.weight", "0.bias", "1.weight", "1.bias")]
        kernel, bias, gamma, beta = (parameters[name] for name in names)
        x = F.conv2d(x, kernel, bias, stride=2, padding=1)
        x = F.relu(F.batch_norm(x, None, None, gamma, beta, training=True))
        if index == 1:
            x = F.pad(x, (0, 1, 0, 1))
    return F.linear(x.flatten(1), parameters["head.weight"], parameters["head.bias"])


def test_the_strided_form_is_the_reference_s_value_and_gradients():
    torch.manual_seed(0)
    model = Conv4((1, 28, 28), 5).double()
    assert sum(p.numel() for p in model.parameters()) == 113_221
    x = torch.rand(10, 1, 28, 28, dtype=torch.float64)
    cotangent = torch.randn(10, 5, dtype=torch.float64)
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours = model(x)
    theirs = reference(dict(zip(names, parameters, strict=True)), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for name, a, b in zip(
        names,
        torch.autograd.grad(ours, parameters, cotangent),
        torch.autograd.grad(theirs, parameters, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
