"""The generator g(ε, y, t; θ), its noise, and the multiplier network h(x, y, t; η)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from gbc.artifacts import Network
from gbc.distributed import BatchNorm1d, BatchNorm2d
from gbc.params import InputError

SILENT = 0.1  # of an even share; an anchor that has less is hardly ever drawn
BEND = 6  # half-periods along an image, beyond which a wave of `Waves` counts less than half
LEAST = 1e-9  # added to every anchor's multipliers: where all have died, anchors are drawn evenly


def kaiming(network: nn.Module, rng: torch.Generator) -> None:
    """Kaiming-normal weights drawn from `rng` and zero biases (He et al. 2015)."""
    for module in network.modules():
        if isinstance(module, nn.ConvTranspose2d):  # stride s: kernel²/s² taps meet in an output pixel
            fan_in = module.in_channels * math.prod(module.kernel_size) / math.prod(module.stride)
        elif isinstance(module, nn.Linear):
            fan_in = module.in_features
        else:
            continue
        with torch.no_grad():
            module.weight.normal_(0, math.sqrt(2 / fan_in), generator=rng)
            if module.bias is not None:
                module.bias.zero_()


def to_uint8(images: Tensor) -> Tensor:
    """Pixels in [0, 1] as 0 … 255."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def cosines(side: int) -> Float[Tensor, "side side"]:
    """Cosine waves of 0, 1, … half-periods over so many pixels, a row each; the rows are orthonormal (the DCT-II)."""
    wave = torch.cos(math.pi / side * torch.outer(torch.arange(side), torch.arange(side) + 0.5))
    return wave / wave.norm(dim=1, keepdim=True)


class ChannelsLast(nn.Module):
    """Changes the memory layout alone: a convolution to one or three channels is several times faster in it on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """The same values."""
        return x.contiguous(memory_format=torch.channels_last)


class Generator(Network):
    """g: noise ε, label y and classifier index t → samples [batch, *output_shape].

    Images, (height, width) or (channels, height, width) with pixels in [0, 1], come out of three fully connected and three
    transposed-convolution layers with ReLU and batch normalisation, as in §5.2; points (a one-dimensional shape) out of three
    fully connected layers. The noise of a label is a mixture of Gaussians of standard deviation `spread` around `anchors` centres of its
    own, drawn once from N(0, I) and kept with the weights; their `shares` of the samples are equal until `weigh`. `known` lists the labels
    of every classifier's training set.
    """

    architecture_keys = ("known", "output_shape", "noise", "anchors", "spread", "width", "channels")
    centres: Tensor
    labels: Tensor
    shares: Tensor

    def __init__(
        self,
        known: tuple[tuple[int, ...], ...],
        output_shape: tuple[int, ...],
        noise: int,
        anchors: int,
        spread: float,
        width: int,
        channels: int,
    ):
        super().__init__()
        self.known, self.output_shape, self.noise, self.anchors, self.spread = known, output_shape, noise, anchors, spread
        self.width, self.channels = width, channels
        self.register_buffer("labels", torch.tensor(sorted(set().union(*known))), persistent=False)
        self.register_buffer("centres", torch.zeros(len(self.labels), anchors, noise))
        self.register_buffer("shares", torch.full((len(known), len(self.labels), anchors), 1 / anchors))  # of t's samples of a label
        sizes = [noise + len(self.labels) + len(known), width, width]
        layers: list[nn.Module] = []
        for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(fan_in, fan_out, bias=False), BatchNorm1d(fan_out), nn.ReLU(True)]
        if len(output_shape) == 1:
            layers += [nn.Linear(width, output_shape[0])]
        else:
            depth = math.prod(output_shape[:-2])
            half = [(side + 1) // 2 for side in output_shape[-2:]]
            quarter = [(side + 1) // 2 for side in half]
            start = channels * math.prod(quarter)
            layers += [nn.Linear(width, start, bias=False), BatchNorm1d(start), nn.ReLU(True), nn.Unflatten(1, (channels, *quarter))]
            for c_in, c_out, sides in [(channels, channels // 2, half), (channels // 2, channels // 4, output_shape[-2:])]:
                kernel = (4 - sides[0] % 2, 4 - sides[1] % 2)  # 4 doubles the side, 3 doubles it less one
                layers += [nn.ConvTranspose2d(c_in, c_out, kernel, stride=2, padding=1, bias=False), BatchNorm2d(c_out), nn.ReLU(True)]
            layers += [ChannelsLast(), nn.ConvTranspose2d(channels // 4, depth, 3, padding=1), nn.Sigmoid()]
        self.layers = nn.Sequential(*layers)

    def initialise(self, rng: torch.Generator) -> "Generator":
        """Draw the centres and Kaiming's weights."""
        self.centres.normal_(generator=rng)
        kaiming(self, rng)
        return self

    def forward(self, epsilon: Float[Tensor, "batch noise"], y: Int[Tensor, " batch"], t: Int[Tensor, " batch"]) -> Tensor:
        """Samples for noise, label and classifier index."""
        label = F.one_hot(torch.searchsorted(self.labels, y), len(self.labels))
        codes = torch.cat([epsilon, label, F.one_hot(t, len(self.known))], 1)
        return self.layers(codes).reshape(-1, *self.output_shape)

    def perturb(self, anchor: Int[Tensor, " batch"], y: Int[Tensor, " batch"], rng: torch.Generator) -> Float[Tensor, "batch noise"]:
        """Fresh noise around the given centres of the given labels."""
        noise = torch.randn(len(anchor), self.noise, generator=rng).to(self.centres)
        return self.centres[torch.searchsorted(self.labels, y), anchor] + self.spread * noise

    @torch.no_grad()
    def weigh(self, h: "Multipliers") -> None:
        """Draw the anchors of a label in proportion to the sum of their samples' multipliers, for each classifier.

        With every sample's multipliers over their sum, the label's part of Eq. 5 stays the same up to scale; and what has no multiplier has
        no part in it, and is free to be anything. The multipliers are h's own, without the floor that training puts under them; where
        training diverged they are no numbers, and anchors are drawn evenly.
        """
        samples = self.anchored()
        for t, labels in enumerate(self.known):
            own = torch.arange(len(labels), device=self.labels.device).repeat_interleave(self.anchors)
            y = torch.tensor(labels, device=own.device)
            place = torch.searchsorted(self.labels, y)
            x = samples[t, place].flatten(0, 1)
            mu = h(x, y[own], t).scatter(1, own[:, None], 0).sum(1).nan_to_num(0, 0).view(-1, self.anchors) + LEAST
            self.shares[t, place] = mu / mu.sum(1, keepdim=True)

    def sample(
        self, count: int, rng: torch.Generator, t: int | None = None, label: int | None = None
    ) -> tuple[Tensor, Int[Tensor, " count"]]:
        """`count` samples from fresh noise, and their labels: `label`, or all in equal shares; on the generator's device.

        For every label y the classifier index is drawn from 𝒯_y, the classifiers that know y, unless `t` fixes it, and the anchors by their
        `shares`.
        """
        return draw([self], count, rng, t, label)

    def _first(self) -> Int[Tensor, " labels"]:
        """The first classifier that knows each label."""
        return torch.tensor([next(t for t, part in enumerate(self.known) if label in part) for label in self.labels.tolist()])

    @torch.no_grad()
    def anchored(self) -> Float[Tensor, "classifiers labels anchors *shape"]:
        """The sample at every anchor, without noise, for every classifier and every label, whether or not it knows that."""
        sizes = (len(self.known), len(self.labels), self.anchors)
        t, label, anchor = torch.cartesian_prod(*map(torch.arange, sizes)).to(self.labels).T
        return self.eval()(self.centres[label, anchor], self.labels[label], t).unflatten(0, sizes)

    def bank(self) -> tuple[Tensor, Int[Tensor, " bank"]]:
        """The sample at every anchor for every label, without noise, and their labels; t is the first classifier that knows the label."""
        x = self.anchored()[self._first(), torch.arange(len(self.labels))].flatten(0, 1)
        return x, self.labels.repeat_interleave(self.anchors)

    def heard(self) -> Bool[Tensor, " bank"]:
        """Which codes of `bank` are drawn at least a tenth as often as an even share would be."""
        return (self.shares[self._first(), torch.arange(len(self.labels))] * self.anchors >= SILENT).flatten()


@torch.no_grad()
def draw(
    members: Sequence[Generator], count: int, rng: torch.Generator, t: int | None, label: int | None
) -> tuple[Tensor, Int[Tensor, " count"]]:
    """`Generator.sample` of several generators for the same classifiers, one sample of each in turn.

    Raises `InputError` if `label` or `t` is unknown.
    """
    first = members[0]
    if t not in (None, *range(len(first.known))):
        raise InputError(f"classifier {t} is unknown to this generator; it was born from {len(first.known)}, counted from 0")
    known = first.known if t is None else (first.known[t],)
    every = sorted(set().union(*known))
    if label not in (None, *every):
        raise InputError(f"label {label} is unknown to this generator; it knows {', '.join(map(str, every))}")
    labels = torch.tensor(every if label is None else [label])
    y = labels[torch.arange(count) * len(labels) // count]
    index = torch.full_like(y, t or 0)
    if t is None:
        knows = torch.tensor([[float(one in part) for part in known] for one in labels.tolist()])
        index = torch.multinomial(knows[torch.searchsorted(labels, y)], 1, generator=rng)[:, 0]
    y, index = (part.to(first.centres.device) for part in (y, index))
    x = torch.empty(count, *first.output_shape, dtype=first.centres.dtype, device=first.centres.device)
    for k, member in enumerate(members):
        turn = torch.arange(count)[k :: len(members)]
        shares = member.shares[index[turn], torch.searchsorted(first.labels, y[turn])]
        anchor = torch.multinomial(shares.cpu(), 1, generator=rng)[:, 0].to(shares.device)
        x[turn] = member.eval()(member.perturb(anchor, y[turn], rng), y[turn], index[turn])
    return x, y


class Mixture(Network):
    """Generators of one shape, born apart from one another from the same classifiers: each finds other training images.

    Eq. 5 is linear in the distribution, so that a mixture of what satisfies it does too; under batch normalisation as far as its members
    have the same batch statistics. `gbc.similarity.agreement` says what members agree on.
    """

    architecture_keys = ("members", *Generator.architecture_keys)
    known: tuple[tuple[int, ...], ...]
    output_shape: tuple[int, ...]

    def __init__(self, members: int, **architecture: Any):
        super().__init__()
        for key, value in architecture.items():
            setattr(self, key, value)
        self.generators = nn.ModuleList(Generator(**architecture) for _ in range(members))

    @classmethod
    def of(cls, generators: Sequence[Generator]) -> "Mixture":
        """The mixture of `generators`, which have one architecture."""
        mixture = cls(0, **{key: getattr(generators[0], key) for key in Generator.architecture_keys})
        mixture.generators.extend(generators)
        return mixture

    @property
    def members(self) -> int:
        """Number of generators."""
        return len(self.generators)

    @property
    def parts(self) -> list[Generator]:
        """The members."""
        return list(self.generators)  # type: ignore[arg-type]

    def sample(
        self, count: int, rng: torch.Generator, t: int | None = None, label: int | None = None
    ) -> tuple[Tensor, Int[Tensor, " count"]]:
        """`Generator.sample`, one of each member in turn; raises `InputError` if what they make are no numbers."""
        x, y = draw(self.parts, count, rng, t, label)
        if not x.isfinite().all():
            raise InputError("the generator makes values that are not numbers: its training diverged; set a smaller learning rate")
        return x, y

    def bank(self) -> tuple[Tensor, Int[Tensor, " bank"]]:
        """`Generator.bank`, one sample of each member in turn."""
        x, y = zip(*(part.bank() for part in self.parts), strict=True)
        return torch.stack(x, 1).flatten(0, 1), torch.stack(y, 1).flatten()

    def heard(self) -> Bool[Tensor, " bank"]:
        """`Generator.heard`, in the order of `bank`."""
        return torch.stack([part.heard() for part in self.parts], 1).flatten()


class Pixels(Generator):
    """No network: one free image for every anchor of every label, the sigmoid of its parameters (Haim et al. 2022, Buzaglo et al. 2023)."""

    def initialise(self, rng: torch.Generator) -> "Pixels":
        """Images of grey noise."""
        count = len(self.labels) * self.anchors
        return self._set(torch.randn(len(self.known) * count, *self.output_shape, generator=rng))

    def _set(self, raw: Tensor) -> "Pixels":
        self.layers, self.raw = nn.Sequential(), nn.Parameter(raw)
        count = len(self.labels) * self.anchors
        self.centres = torch.arange(count, dtype=raw.dtype).reshape(len(self.labels), self.anchors, 1)  # the number of every image
        return self

    def logits(self) -> Tensor:
        """Every image before the sigmoid."""
        return self.raw

    def forward(self, epsilon: Float[Tensor, "batch 1"], y: Int[Tensor, " batch"], t: Int[Tensor, " batch"]) -> Tensor:
        """The images of these numbers."""
        return self.logits().sigmoid()[t * self.centres.numel() + epsilon[:, 0].long()]

    def perturb(self, anchor: Int[Tensor, " batch"], y: Int[Tensor, " batch"], rng: torch.Generator) -> Float[Tensor, "batch 1"]:
        """The number of every image: there is no noise."""
        return self.centres[torch.searchsorted(self.labels, y), anchor]


class Waves(Pixels):
    """Free images as sums of cosine waves; the finer a wave, the less its parameter counts.

    Adam, which moves all parameters alike, then draws the coarse before the fine, and little noise (compare Olah et al. 2017, "Feature
    visualization", on preconditioning). A wave of k half-periods down and l across counts in proportion to 1 / (1 + (k² + l²) / `BEND`²);
    on average, of squares, all count as much as a pixel of `Pixels`.
    """

    down: Tensor
    across: Tensor
    weights: Tensor

    @classmethod
    def of(cls, g: Generator) -> "Waves":
        """The samples of `g` at its anchors, without noise."""
        x = g.anchored().flatten(0, 2)
        return cls(**{key: getattr(g, key) for key in g.architecture_keys})._set(x.clamp(0.005, 0.995).logit()).to(x.device)

    def _set(self, raw: Tensor) -> "Waves":
        height, width = raw.shape[-2:]
        weights = 1 / (1 + (torch.arange(height)[:, None] ** 2 + torch.arange(width) ** 2) / BEND**2)
        parts = {"down": cosines(height), "across": cosines(width), "weights": weights / weights.square().mean().sqrt()}
        for name, part in parts.items():
            self.register_buffer(name, part.to(raw.device), persistent=False)
        super()._set(self.down @ raw @ self.across.T / self.weights)
        return self

    def logits(self) -> Tensor:
        """The sums of the waves."""
        return self.down.T @ (self.raw * self.weights) @ self.across


class Multipliers(nn.Module):
    """h: samples x, labels y and classifier indices t → μ ≥ 0 [batch, labels], one multiplier per class.

    `positive` makes it so: "relu", the paper's; "softplus", under which no class's multipliers can die; or "equal", all 1 and nothing
    learned, which the training images of a batch-normalised classifier nearly have, so that images must explain what multipliers
    would absorb. The multiplier of the sample's own label meets a zero margin and has no effect.
    """

    labels: Tensor

    def __init__(self, known: tuple[tuple[int, ...], ...], input_shape: tuple[int, ...], width: int, positive: str):
        super().__init__()
        self.known = known
        self.positive = {"relu": F.relu, "softplus": F.softplus, "equal": None}[positive]
        self.register_buffer("labels", torch.tensor(sorted(set().union(*known))))
        classes = len(self.labels)
        fan_in = math.prod(input_shape) + classes + len(known)
        learned = [nn.Linear(fan_in, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)]
        self.layers = nn.Sequential(*learned if self.positive else [])

    def initialise(self, rng: torch.Generator) -> "Multipliers":
        """Kaiming's weights, the last layer's small: every multiplier starts alive, near 1."""
        kaiming(self, rng)
        if self.positive:
            with torch.no_grad():
                last = self.layers[-1]
                assert isinstance(last, nn.Linear)
                last.weight.mul_(0.1)
                last.bias.fill_(1.0)
        return self

    def forward(self, x: Tensor, y: Int[Tensor, " batch"], t: int) -> Float[Tensor, "batch classes"]:
        """Multipliers for the classes of classifier `t`."""
        if self.positive is None:
            return x.new_ones(len(x), len(self.known[t]))
        label = F.one_hot(torch.searchsorted(self.labels, y), len(self.labels))
        index = F.one_hot(torch.full_like(y, t), len(self.known))
        mu = self.positive(self.layers(torch.cat([x.flatten(1), label, index], 1)))
        return mu[:, torch.searchsorted(self.labels, torch.tensor(self.known[t], device=y.device))]
