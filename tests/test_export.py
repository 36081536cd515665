"""The two commands for a generator's folder alone: sampling and export, each compared with the eager generator."""

import copy
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image

from gbc import sample
from gbc.artifacts import load_network, save_network
from gbc.export import export, main
from gbc.generator import Generator, Mixture
from gbc.params import InputError
from gbc.sample import agreed_images, grid
from gbc.similarity import AGREED, agreement

KNOWN = ((0, 1), (1, 5))
ONNX = all(find_spec(package) for package in ("onnx", "onnxscript"))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def saved(folder: Path, shape: tuple[int, ...]) -> Mixture:
    """Two random generators, written to `folder`; a few training batches give their normalisations statistics of their own."""
    parts = [Generator(KNOWN, shape, noise=3, anchors=4, spread=0.5, width=16, channels=8).initialise(rng(k)) for k in range(2)]
    for k, g in enumerate(parts):
        g.shares.uniform_(generator=rng(7 + k)).div_(g.shares.sum(2, keepdim=True))
        for seed in range(5):
            g.train()(torch.randn(20, 3, generator=rng(seed)), g.labels[torch.arange(20) % 3], torch.arange(20) % 2)
    save_network(folder, Mixture.of(parts))
    return Mixture.of(parts).eval()


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module", params=[(8, 8), (3, 8, 8), (2,)], ids=str)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Mixture, Path]:
    """A generator and the folder with its exported files, without generator.onnx if the packages that it needs are absent."""
    folder = tmp_path_factory.mktemp("exported")
    g = saved(folder / "artifact", request.param)
    with nullcontext() if ONNX else pytest.raises(InputError, match="pip install"):
        export(folder / "artifact", folder)
    return g, folder


def inputs(batch: int) -> tuple[torch.Tensor, ...]:
    """Fresh ε and u, and every label with every classifier and every member in turn."""
    label, index = torch.tensor([0, 1, 5]).repeat(batch)[:batch], torch.arange(batch) % 2
    return torch.randn(batch, 3, generator=rng(9)), torch.rand(batch, generator=rng(10)), label, index, torch.arange(batch) // 2 % 2


def eager(mixture: Mixture, batch: int) -> torch.Tensor:
    """What the members make of `inputs`, each of its own."""
    samples = []
    for epsilon, u, y, t, member in zip(*inputs(batch), strict=True):
        g = mixture.parts[int(member)]
        place = g.labels.tolist().index(int(y))
        anchor = next(k for k in range(4) if u < g.shares[t, place, : k + 1].sum())
        samples.append(g((g.centres[place, anchor] + g.spread * epsilon)[None], y[None], t[None])[0])
    return torch.stack(samples)


@pytest.mark.parametrize("batch", [1, 7])
def test_torch_export_is_the_eager_generator(exported: tuple[Mixture, Path], batch: int):
    g, folder = exported
    samples = torch.export.load(folder / "generator.pt2").module()(*inputs(batch))
    assert samples.shape == (batch, *g.output_shape)
    torch.testing.assert_close(samples, eager(g, batch), atol=1e-5, rtol=0, check_stride=False)


@pytest.mark.skipif(not ONNX, reason="onnx and onnxscript are not installed: pip install -e '.[export]'")
@pytest.mark.parametrize("batch", [1, 7])
def test_onnx_is_the_eager_generator(exported: tuple[Mixture, Path], batch: int):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -e '.[export]'")
    g, folder = exported
    session = runtime.InferenceSession(folder / "generator.onnx")
    assert [(part.name, part.shape) for part in session.get_inputs()] == [
        ("epsilon", ["batch", 3]),
        *((name, ["batch"]) for name in ("u", "y", "t", "member")),
    ]
    named = dict(zip(("epsilon", "u", "y", "t", "member"), (part.numpy() for part in inputs(batch)), strict=True))
    samples = torch.from_numpy(session.run(["samples"], named)[0])
    torch.testing.assert_close(samples, eager(g, batch), atol=1e-5, rtol=0, check_stride=False)


def test_label_classifier_and_member_change_the_samples_compared(exported: tuple[Mixture, Path]):
    """Otherwise the exports could ignore them unnoticed."""
    first, second = exported[0].parts
    epsilon = torch.zeros(3, 3)
    samples = [first(epsilon, torch.tensor([0, 1, 5]), torch.tensor([0, 0, 0])), first(epsilon[:1], torch.tensor([1]), torch.tensor([1]))]
    samples = torch.cat([*samples, second(epsilon[:1], torch.tensor([0]), torch.tensor([0]))]).flatten(1)
    assert torch.cdist(samples, samples)[~torch.eye(5, dtype=torch.bool)].min() > 1e-3


def test_the_files_do_not_name_this_machines_folders(exported: tuple[Mixture, Path]):
    for path in exported[1].glob("generator.*"):
        assert str(Path(__file__).parent.parent).encode() not in path.read_bytes()


def test_without_onnx_one_line_says_what_to_install(tmp_path: Path):
    saved(tmp_path / "artifact", (2,))
    code = "import sys; sys.modules['onnx'] = None; from gbc.export import main; main()"
    done = python("-c", code, "artifact", "--out", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "error: generator.onnx is not written, it needs onnx: pip install -e '.[export]'\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["generator.pt2"]


def test_a_drawn_label_is_fresh_noise_of_that_label_for_the_classifiers_that_know_it(tmp_path: Path):
    saved(tmp_path, (2,))
    g = load_network(tmp_path, Mixture)
    seen: list[torch.Tensor] = []
    for part in g.parts:
        part.layers.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    assert g.sample(6000, rng(), label=1)[0].shape == (6000, 2)
    g.sample(200, rng(), label=5)
    for part, codes, others in zip(g.parts, seen[:2], seen[2:], strict=True):
        label, index = codes[:, 3:6], codes[:, 6:]
        assert (label.argmax(1) == 1).all()
        assert 0.4 < index[:, 1].mean() < 0.6
        assert (others[:, 7] == 1).all()
        assert codes[:, :3].unique(dim=0).shape == (3000, 3)
        centre = torch.cdist(codes[:, :3], part.centres[1]).argmin(1)
        assert torch.bincount(centre, minlength=4).min() > 300


def test_agreed_images_are_those_of_one_member_that_another_has_too_the_surest_first(tmp_path: Path):
    first, other = saved(tmp_path, (12, 12)).parts
    twin = copy.deepcopy(first)
    twin.centres[0] += torch.tensor([0.1, 0.0, 0.07, 0.01])[:, None]  # of the first label they agree more or less
    twins = Mixture.of([first, twin])
    similarity = agreement(*twins.bank(), twins.heard(), 2)[::2]
    assert (similarity[:4] > AGREED).all()
    assert similarity[:4].argsort(descending=True).tolist() == [1, 3, 2, 0]
    torch.testing.assert_close(agreed_images(twins, 0), first.bank()[0][[1, 3, 2, 0]])
    assert len(agreed_images(twins)) == 12
    first.shares[0, 0] = torch.tensor([0.5, 0.0, 0.3, 0.2])  # the first label's surest is never drawn
    torch.testing.assert_close(agreed_images(twins, 0), first.bank()[0][[3, 2, 0]])
    twins.parts[1].layers.load_state_dict(other.layers.state_dict())
    agreed = agreement(*twins.bank(), twins.heard(), 2)[::2] > AGREED
    assert not agreed.all()
    with pytest.raises(InputError, match="agree on no image of label 3"):
        agreed_images(twins, 3)
    with pytest.raises(InputError, match="this generator has one member"):
        agreed_images(Mixture.of([first]))


def test_the_command_draws_agreed_images(tmp_path: Path):
    first = saved(tmp_path, (12, 12)).parts[0]
    save_network(tmp_path / "twins", Mixture.of([first, copy.deepcopy(first)]))
    done = python("-m", "gbc.sample", "twins", "--agreed", "--count", "5", "--out", "agreed.png", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    with Image.open(tmp_path / "agreed.png") as image:
        assert image.size == (3 * 14 + 2, 2 * 14 + 2)


@pytest.mark.parametrize(("shape", "mode"), [((8, 8), "L"), ((3, 8, 8), "RGB")], ids=str)
def test_the_sampling_command_draws_from_the_folder_alone(tmp_path: Path, shape: tuple[int, ...], mode: str):
    g = saved(tmp_path / "artifact", shape)
    done = python("-m", "gbc.sample", "artifact", "--label", "1", "--count", "7", "--seed", "4", "--out", "grid.png", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "grid.png"]
    with Image.open(tmp_path / "grid.png") as image:
        assert image.size == (3 * 10 + 2, 3 * 10 + 2)  # 7 images on 3 × 3 places, two pixels between
        first = torch.tensor(list(image.convert(mode).crop((2, 2, 10, 10)).tobytes())).view(8, 8, -1).movedim(-1, 0)
    torch.testing.assert_close(first.float(), g.sample(7, rng(4), label=1)[0][0].reshape(-1, 8, 8) * 255, atol=0.51, rtol=0)
    png = (tmp_path / "grid.png").read_bytes()
    assert png == grid(tmp_path / "artifact", 7, 4, 1)
    others = [grid(tmp_path / "artifact", 7, seed, label) for seed, label in [(5, 1), (4, 5), (4, None)]]
    assert len({png, *others}) == 4


BAD = [
    (sample.main, ["nowhere"], "nowhere/architecture.json: cannot be read"),
    (sample.main, ["images", "--label", "3"], "label 3 is unknown to this generator; it knows 0, 1, 5"),
    (sample.main, ["images", "--count", "0"], "count=0 is less than 1"),
    (sample.main, ["images", "--seed", "-1"], "seed=-1 is not in"),
    (sample.main, ["points"], "points: its samples have shape [2]; there are no images to draw"),
    (sample.main, ["images", "--out", "images"], "Is a directory"),
    (main, ["nowhere"], "nowhere/architecture.json: cannot be read"),
]


@pytest.mark.parametrize(("command", "arguments", "message"), BAD)
def test_bad_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[[], None], arguments: list[str], message: str
):
    saved(tmp_path / "images", (8, 8))
    saved(tmp_path / "points", (2,))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["command", "--out", "out.png", *arguments])
    with pytest.raises(SystemExit) as end:
        command()
    told = str(end.value.code)
    assert told.startswith("error: ")
    assert message in told
    assert "\n" not in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "points"]


def test_bad_input_is_exit_code_1_without_a_traceback(tmp_path: Path):
    done = python("-m", "gbc.sample", "nowhere", "--out", "out.png", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: nowhere/architecture.json: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("module", ["sample", "export"])
def test_help_does_not_wait_for_torch(tmp_path: Path, module: str):
    done = python("-X", "importtime", "-m", f"gbc.{module}", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: python -m gbc.{module} ")
    assert " gbc.params" in done.stderr
    assert "torch" not in {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
