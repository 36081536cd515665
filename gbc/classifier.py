"""The classifiers Φ(x; ζ): three-layer fully connected ReLU networks, as in the paper's §5."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from gbc.artifacts import Network


class SmoothGateReLU(nn.Module):
    """ReLU whose derivative is σ(`sharpness`·z) while `sharpness` is set: the smooth gate of Haim et al. 2022.

    The value is exactly ReLU's. With the derivative of softplus instead of a step, the stationarity loss has a gradient
    through the activation pattern, without which the residual stalls far above its oracle.
    """

    sharpness: float | None = None

    def forward(self, z: Tensor) -> Tensor:
        """Apply elementwise."""
        if self.sharpness is None:
            return F.relu(z)
        smooth = F.softplus(z, beta=self.sharpness, threshold=50.0)
        return smooth + (F.relu(z) - smooth).detach()


class Classifier(Network):
    """Multi-layer perceptron Φ: [batch, *input_shape] → logits [batch, classes].

    `homogeneous` has a bias in layer 1 only, `biased` in every layer, and `batchnorm` (the paper's) replaces the hidden
    biases by batch normalisation and has none in the last layer. `labels` names the classes behind the logits.
    """

    architecture_keys = ("architecture", "input_shape", "hidden", "labels")

    def __init__(self, architecture: str, input_shape: tuple[int, ...], hidden: tuple[int, ...], labels: tuple[int, ...]):
        super().__init__()
        self.architecture, self.input_shape, self.hidden, self.labels = architecture, input_shape, hidden, labels
        widths = [math.prod(input_shape), *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for i, (fan_in, fan_out) in enumerate(zip(widths, hidden, strict=False)):
            layers.append(nn.Linear(fan_in, fan_out, bias=architecture == "biased" or (architecture == "homogeneous" and i == 0)))
            if architecture == "batchnorm":
                layers.append(nn.BatchNorm1d(fan_out))
            layers.append(SmoothGateReLU())
        layers.append(nn.Linear(widths[-1], len(labels), bias=architecture == "biased"))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "batch *input"]) -> Float[Tensor, "batch classes"]:
        """Logits. In train mode batch normalisation uses, and updates, the statistics of this batch."""
        return self.layers(x)

    def freeze(self) -> "Classifier":
        """Fix the function that was trained: train mode, normalising by the batch, its running statistics left as they are."""
        for module in self.train().modules():
            if isinstance(module, nn.BatchNorm1d):
                module.track_running_stats = False
        return self

    @torch.no_grad()
    def settle(self, x: Tensor) -> None:
        """Set the running statistics to those of `x`: where their moving averages go under full-batch training."""
        for module in self.train().modules():
            if isinstance(module, nn.BatchNorm1d):
                module.momentum = 1.0
        self(x)

    def set_gate(self, sharpness: float | None) -> None:
        """Set the smooth gate's sharpness, None for ReLU's own derivative."""
        for module in self.modules():
            if isinstance(module, SmoothGateReLU):
                module.sharpness = sharpness

    def initialise(self, rng: torch.Generator, first_scale: float, rest_scale: float) -> None:
        """Kaiming-normal weights, scaled small: what remains of ζ(0) at the end is residual that no image explains."""
        linears = [module for module in self.modules() if isinstance(module, nn.Linear)]
        with torch.no_grad():
            for i, linear in enumerate(linears):
                std = math.sqrt(2 / linear.in_features) * (first_scale if i == 0 else rest_scale)
                linear.weight.normal_(0, std, generator=rng)
                if linear.bias is not None:
                    linear.bias.zero_()
            for module in self.modules():
                if isinstance(module, nn.BatchNorm1d):
                    module.weight.fill_(rest_scale)
