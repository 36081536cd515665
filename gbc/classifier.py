"""The classifiers Φ(x; ζ): three-layer fully connected ReLU networks, as in the paper's §5, a convolutional and a residual one."""

import itertools
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from gbc.artifacts import Network
from gbc.distributed import BatchNorm1d, BatchNorm2d
from gbc.params import ARCHITECTURES, InputError


class _SmoothGate(torch.autograd.Function):
    """relu(z), with the derivative σ(sharpness·z); twice differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, sharpness: float) -> Tensor:
        return z.clamp_min(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.sharpness = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0] * torch.sigmoid(ctx.sharpness * ctx.saved_tensors[0]), None


class SmoothGateReLU(nn.Module):
    """ReLU whose derivative is σ(`sharpness`·z) while `sharpness` is set: the smooth gate of Haim et al. 2022.

    The value is exactly ReLU's, unless `soft` makes it softplus's, log(1 + e^{az})/a, whose derivative the smooth gate is.
    """

    sharpness: float | None = None
    soft = False

    def forward(self, z: Tensor) -> Tensor:
        """Apply elementwise."""
        if self.sharpness is None:
            return F.relu(z)
        if self.soft:
            return F.softplus(z, beta=self.sharpness, threshold=50.0)
        return _SmoothGate.apply(z, self.sharpness)


class Residual(nn.Module):
    """x → relu(x + two 3×3 convolutions of x, each with batch normalisation)."""

    def __init__(self, channels: int):
        super().__init__()
        layers = [_convolution(channels, channels), BatchNorm2d(channels), SmoothGateReLU()]
        self.branch = nn.Sequential(*layers, _convolution(channels, channels), BatchNorm2d(channels))
        self.gate = SmoothGateReLU()

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """The same shape."""
        return self.gate(x + self.branch(x))


def _convolution(c_in: int, c_out: int, bias: bool = False) -> nn.Conv2d:
    """3×3, keeping height and width."""
    return nn.Conv2d(c_in, c_out, 3, padding=1, bias=bias)


def perceptron(architecture: str, fan_in: int, hidden: tuple[int, ...], classes: int) -> list[nn.Module]:
    """Fully connected layers of the given hidden widths."""
    widths = [fan_in, *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for i, (c_in, c_out) in enumerate(itertools.pairwise(widths)):
        layers.append(nn.Linear(c_in, c_out, bias=architecture == "biased" or (architecture == "homogeneous" and i == 0)))
        if architecture == "batchnorm":
            layers.append(BatchNorm1d(c_out))
        layers.append(SmoothGateReLU())
    return [*layers, nn.Linear(widths[-1], classes, bias=architecture == "biased")]


def convolutional(architecture: str, input_shape: tuple[int, ...], channels: tuple[int, ...], classes: int) -> list[nn.Module]:
    """For each number of channels a 3×3 convolution, halved by average pooling; then a linear layer.

    `convolutional` has a bias in the first convolution only; `residual` has batch normalisation, and a residual block after each pooling.
    """
    depth, height, width = (1, *input_shape)[-3:]
    widths = [depth, *channels]
    layers: list[nn.Module] = [nn.Unflatten(1, (1, height))] if len(input_shape) == 2 else []
    for i, (c_in, c_out) in enumerate(itertools.pairwise(widths)):
        if architecture == "residual":
            layers += [_convolution(c_in, c_out), BatchNorm2d(c_out), SmoothGateReLU(), nn.AvgPool2d(2), Residual(c_out)]
        else:
            layers += [_convolution(c_in, c_out, bias=i == 0), SmoothGateReLU(), nn.AvgPool2d(2)]
    sides = (height >> len(channels)) * (width >> len(channels))
    return [*layers, nn.Flatten(), nn.Linear(widths[-1] * sides, classes, bias=False)]


class Classifier(Network):
    """Φ: [batch, *input_shape] → logits [batch, classes].

    Fully connected: `homogeneous` has a bias in layer 1 only, `biased` in every layer, and `batchnorm` (the paper's) replaces the hidden
    biases by batch normalisation and has none in the last layer; `hidden` holds widths. `convolutional` and `residual` take images,
    (height, width) or (channels, height, width), and `hidden` holds channels. `labels`, ascending, names the classes behind the logits.
    Raises `InputError` if there is no such architecture, labels do not ascend, or the inputs are too small.
    """

    architecture_keys = ("architecture", "input_shape", "hidden", "labels")

    def __init__(self, architecture: str, input_shape: tuple[int, ...], hidden: tuple[int, ...], labels: tuple[int, ...]):
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise InputError(f"there is no architecture {architecture!r}; there are {', '.join(ARCHITECTURES)}")
        if list(labels) != sorted(set(labels)):
            raise InputError(f"a classifier's labels must ascend, in the order of its outputs; they are {', '.join(map(str, labels))}")
        self.architecture, self.input_shape, self.hidden, self.labels = architecture, input_shape, hidden, labels
        if architecture in ("convolutional", "residual"):
            if len(input_shape) < 2 or min(input_shape[-2:]) >> len(hidden) == 0:
                raise InputError(f"a {architecture} network with {len(hidden)} poolings cannot take inputs of shape {input_shape}")
            self.layers = nn.Sequential(*convolutional(architecture, input_shape, hidden, len(labels)))
        else:
            self.layers = nn.Sequential(*perceptron(architecture, math.prod(input_shape), hidden, len(labels)))

    def forward(self, x: Float[Tensor, "batch *input"]) -> Float[Tensor, "batch classes"]:
        """Logits. In train mode batch normalisation uses, and updates, the statistics of this batch."""
        return self.layers(x)

    def freeze(self) -> "Classifier":
        """Fix the function that was trained: train mode, normalising by the batch, its running statistics left as they are."""
        for module in self.train().modules():
            if isinstance(module, _BatchNorm):
                module.track_running_stats = False
        return self

    @torch.no_grad()
    def settle(self, x: Tensor) -> None:
        """Set the running statistics to those of `x`: where their moving averages go under full-batch training."""
        for module in self.train().modules():
            if isinstance(module, _BatchNorm):
                module.momentum = 1.0
        self(x)

    def set_gate(self, sharpness: float | None, soft: bool = False) -> "Classifier":
        """Set the smooth gate's sharpness, None for ReLU's own derivative; `soft` makes the values softplus's too."""
        for module in self.modules():
            if isinstance(module, SmoothGateReLU):
                module.sharpness, module.soft = sharpness, soft
        return self

    def initialise(self, rng: torch.Generator, first_scale: float, rest_scale: float) -> None:
        """Kaiming-normal weights, scaled small: what remains of ζ(0) at the end is residual that no image explains."""
        weighted = [module for module in self.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        with torch.no_grad():
            for i, module in enumerate(weighted):
                std = math.sqrt(2 / module.weight[0].numel()) * (first_scale if i == 0 else rest_scale)
                module.weight.normal_(0, std, generator=rng)
                if module.bias is not None:
                    module.bias.zero_()
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.weight.fill_(rest_scale)
