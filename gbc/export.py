"""Write a generator as generator.pt2 (torch.export) and generator.onnx: python -m gbc.export data/generators/mnist --out exported.

Both take epsilon [batch, noise] from the standard normal and u [batch] from the uniform distribution on [0, 1), float32, and y, t and
member, [batch] int64 each, for any batch, and give samples [batch, *output_shape]: those of `Generator.sample`, for u chooses the anchor by
its share. Classifiers t and members count from 0; an unknown label is not told from a known one.
"""

import argparse
import io
import sys
from pathlib import Path

from gbc.params import InputError


def export(artifact: Path, folder: Path) -> None:
    """Write the generator in folder `artifact`, in evaluation mode, to `folder`.

    Raises `InputError` if there is no generator, or if a package that ONNX needs is missing; generator.pt2 is written all the same.
    """
    import torch
    from torch import Tensor, nn

    from gbc.artifacts import load_network, write_bytes
    from gbc.generator import Mixture

    class Exported(nn.Module):
        """Samples of each one's member; ONNX has no searchsorted, so that the one-hot codes of known y and t are comparisons."""

        def __init__(self, mixture: Mixture):
            super().__init__()
            self.mixture = mixture
            self.edges = torch.stack([part.shares.cumsum(2)[..., :-1] for part in mixture.parts])  # between the anchors' parts of [0, 1)
            self.centres = torch.stack([part.centres for part in mixture.parts])

        def forward(self, epsilon: Tensor, u: Tensor, y: Tensor, t: Tensor, member: Tensor) -> Tensor:
            label = (y[:, None] == self.mixture.parts[0].labels).float()
            index = (t[:, None] == torch.arange(len(self.mixture.known))).float()
            place = label.argmax(1)
            anchor = (u[:, None] >= self.edges[member, t, place]).sum(1)
            noise = self.centres[member, place, anchor] + self.mixture.parts[0].spread * epsilon
            codes, samples = torch.cat([noise, label, index], 1), epsilon.new_zeros(1)
            for k, part in enumerate(self.mixture.parts):
                chosen = (member == k).reshape(-1, *[1] * len(self.mixture.output_shape))
                samples = torch.where(chosen, part.layers(codes).reshape(-1, *self.mixture.output_shape), samples)
            return samples

    mixture = load_network(artifact, Mixture).requires_grad_(False)
    y = mixture.parts[0].labels[[0, 0]]
    arguments = (torch.zeros(2, mixture.parts[0].noise), torch.zeros(2), y, torch.zeros_like(y), torch.zeros_like(y))
    program = torch.export.export(Exported(mixture).eval(), arguments, dynamic_shapes=({0: torch.export.Dim("batch")},) * 5)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # this machine's paths
    content = io.BytesIO()
    torch.export.save(program, content)
    write_bytes(folder / "generator.pt2", content.getvalue())
    try:
        onnx = torch.onnx.export(
            program, dynamic_shapes=({0: "batch"}, None, None, None, None), dynamo=True, verbose=False, output_names=["samples"]
        )
    except ImportError as error:
        raise InputError(f"generator.onnx is not written, it needs {error.name}: pip install -e '.[export]'") from error
    assert onnx is not None
    write_bytes(folder / "generator.onnx", onnx.model_proto.SerializeToString())


def main() -> None:
    """The command; bad input ends in one line on stderr and exit code 1."""
    parser = argparse.ArgumentParser(prog="python -m gbc.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="folder with architecture.json and weights.safetensors")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the two files to")
    arguments = parser.parse_args()
    try:
        export(arguments.artifact, arguments.out)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
