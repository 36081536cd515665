"""Sampling, on the shipped images and on files in each source's real layout."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import lfw_subset

from gbc.datasets import SMALLEST, sample
from gbc.params import InputError, SampleParams
from gbc.similarity import RADIUS

MNIST = "data/raw/mnist_5000.npz"
DIGITS = list(range(10))


def drawn(source: str, classes: list[int], per_class: int, path: str = "", attribute: str = "", seed: int = 0) -> dict[str, torch.Tensor]:
    return sample(SampleParams(source=source, classes=classes, per_class=per_class, path=path, attribute=attribute), seed)


def test_circle_is_18_points_in_three_arcs_and_splits_evenly():
    whole = drawn("circle", [0, 1, 2], 6, "all")
    halves = [drawn("circle", [0, 1, 2], 3, part) for part in ("even", "odd")]
    torch.testing.assert_close(whole["train_x"].norm(dim=1), torch.ones(18))
    together = {tuple(point) for half in halves for point in half["train_x"].tolist()}
    assert together == {tuple(point) for point in whole["train_x"].tolist()}
    assert not len(whole["control_x"])


def test_mnist_is_balanced_without_replacement_and_its_roles_are_disjoint():
    data = drawn("mnist", DIGITS, 50, MNIST)
    with np.load(MNIST) as file:
        assert np.bincount(file["labels"]).tolist() == [500] * 10
    assert torch.bincount(data["train_y"]).tolist() == torch.bincount(data["control_y"]).tolist() == [50] * 10
    assert torch.bincount(data["reference_y"]).tolist() == [200] * 10
    images = torch.cat([data[f"{role}_x"] for role in ("train", "control", "reference")]).flatten(1)
    assert len({row.numpy().tobytes() for row in images}) == len(images)
    assert images.min() == 0
    assert images.max() == 1


def test_a_class_is_drawn_alike_whatever_the_other_classes_and_differently_with_another_seed():
    every, high = drawn("mnist", DIGITS, 20, MNIST), drawn("mnist", [5, 6, 7, 8, 9], 20, MNIST)
    assert torch.equal(every["train_x"][100:], high["train_x"])
    assert not torch.equal(high["train_x"], drawn("mnist", [5, 6, 7, 8, 9], 20, MNIST, seed=1)["train_x"])


def test_more_images_than_the_source_has_are_refused():
    with pytest.raises(InputError, match="has 500 images of class 0, fewer than per_class=600"):
        drawn("mnist", DIGITS, 600, MNIST)


def test_faces_are_the_first_hundred():
    data = drawn("faces", [0, 1], 50)
    faces = lfw_subset()[:100].astype(np.float32)
    for image, label in zip(data["train_x"].numpy(), data["train_y"], strict=True):
        assert bool((faces == image).all((1, 2)).any()) == bool(label)
    assert len(data["control_x"]) == 100
    assert not len(data["reference_x"])


def test_torchvision_reads_the_original_files(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    labels = np.arange(40, dtype=np.uint8) % 10
    for stem, n in (("train", 40), ("t10k", 40)):
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, n, 28, 28) + images.tobytes())
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + labels.tobytes())
    data = drawn("torchvision", [3, 7], 2, str(tmp_path))
    assert data["train_x"].shape == (4, 28, 28)
    assert all(
        (images[labels == y] == (x * 255).round().numpy()).all((1, 2)).any() for x, y in zip(data["train_x"], data["train_y"], strict=True)
    )
    (raw / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03\0")  # a copy that was interrupted
    with pytest.raises(InputError, match=r"no MNIST there and none could be fetched \(.+\); place its files in .*/MNIST/raw"):
        drawn("torchvision", [3, 7], 2, str(tmp_path))


def celeba(root, count: int = 12) -> None:
    """Files in CelebA's real layout: images of 178×218, red for class 1 of Male and blue for class 0."""
    base = root / "celeba"
    (base / "img_align_celeba").mkdir(parents=True)
    names = [f"{i:06d}.jpg" for i in range(1, count + 1)]
    male = [1 if i % 2 else -1 for i in range(count)]
    for name, value in zip(names, male, strict=True):
        Image.new("RGB", (178, 218), (255, 0, 0) if value == 1 else (0, 0, 255)).save(base / "img_align_celeba" / name)

    def write(name: str, header: str, rows: list[str]) -> None:
        (base / name).write_text(header + "".join(f"{n} {row}\n" for n, row in zip(names, rows, strict=True)))

    write("list_eval_partition.txt", "", ["0"] * count)
    write("identity_CelebA.txt", "", ["1"] * count)
    write("list_attr_celeba.txt", f"{count}\nMale Young \n", [f"{value} 1" for value in male])
    write("list_bbox_celeba.txt", f"{count}\nx_1 y_1 width height\n", ["0 0 1 1"] * count)
    write("list_landmarks_align_celeba.txt", f"{count}\nlefteye_x lefteye_y\n", ["0 0"] * count)


def test_celeba_is_cropped_resized_and_labelled_by_its_attribute(tmp_path, monkeypatch):
    celeba(tmp_path)
    monkeypatch.setattr("torchvision.datasets.CelebA._check_integrity", lambda self: True)  # the real one wants the real 1.4 GB
    data = drawn("celeba", [0, 1], 2, str(tmp_path), "Male")
    assert data["train_x"].shape == (4, 3, 32, 32)
    assert data["train_y"].tolist() == [0, 0, 1, 1]
    red, blue = data["train_x"][:, 0].mean((1, 2)), data["train_x"][:, 2].mean((1, 2))
    assert ((red > 0.9) == (data["train_y"] == 1)).all()
    assert ((blue > 0.9) == (data["train_y"] == 0)).all()
    with pytest.raises(InputError, match="no attribute 'Hat'; it has Male, Young"):
        drawn("celeba", [0, 1], 2, str(tmp_path), "Hat")
    with pytest.raises(InputError, match="no attribute ''; it has Male, Young"):
        drawn("celeba", [0, 1], 2, str(tmp_path))


def test_celeba_without_data_says_what_to_put_where(tmp_path):
    (tmp_path / "celeba").mkdir()
    with pytest.raises(InputError, match=r"no whole copy of CelebA there \(.+\); place img_align_celeba/, list_attr_celeba.txt"):
        drawn("celeba", [0, 1], 2, str(tmp_path), "Male")


def test_a_fetch_of_celeba_that_failed_is_said_and_tried_again(tmp_path, monkeypatch):
    class TooMany(Exception):
        pass

    def download(data):
        tries.append(data)
        (tmp_path / "celeba").mkdir(exist_ok=True)  # as the real one does at once
        raise TooMany("quota\n  exceeded")

    tries = []
    monkeypatch.setattr("torchvision.datasets.CelebA.download", download)
    for _ in range(2):
        with pytest.raises(InputError, match=r"\(quota exceeded\)"):
            drawn("celeba", [0, 1], 2, str(tmp_path), "Male")
    assert len(tries) == 2


def test_an_image_folder_has_one_class_per_sub_folder(tmp_path):
    for label, shade in (("cats", 10), ("dogs", 200)):
        (tmp_path / label).mkdir()
        for i in range(4):
            Image.new("L", (12, 11), shade + i).save(tmp_path / label / f"{i}.png")
    data = drawn("folder", [0, 1], 3, str(tmp_path))
    assert data["train_x"].shape == (6, 11, 12)
    assert ((data["train_x"] > 0.5).all((1, 2)) == (data["train_y"] == 1)).all()
    control = int(256 * data["control_x"][0, 0, 0]) - 10  # the number of the cat that was not drawn
    Image.new("RGB", (12, 11), (0, 0, 9)).save(tmp_path / "cats" / f"{control}.png")
    coloured = drawn("folder", [0, 1], 3, str(tmp_path))
    assert coloured["train_x"].shape[1:] == coloured["control_x"].shape[1:] == (3, 11, 12)
    (tmp_path / "cats" / f"{control}.png").write_bytes((tmp_path / "dogs/0.png").read_bytes()[:50])
    with pytest.raises(InputError, match="must be readable and of one size"):
        drawn("folder", [0, 1], 3, str(tmp_path))


def test_npz_is_read_and_its_labels_must_match(tmp_path):
    images, labels = np.random.default_rng(0).random((8, 12, 11), dtype=np.float32), np.repeat([0, 1], 4)
    np.savez(tmp_path / "good.npz", images=images, labels=labels)
    data = drawn("npz", [0, 1], 2, str(tmp_path / "good.npz"))
    assert all((images == x).all((1, 2)).any() for x in data["train_x"].numpy())
    np.savez(tmp_path / "grey.npz", images=images[:, None], labels=labels)
    assert torch.equal(drawn("npz", [0, 1], 2, str(tmp_path / "grey.npz"))["train_x"], data["train_x"])
    with pytest.raises(InputError, match="no image of some class left as a control: per_class=4 is too many"):
        drawn("npz", [0, 1], 4, str(tmp_path / "good.npz"))
    assert SMALLEST == 2 * RADIUS + 1
    np.savez(tmp_path / "small.npz", images=images[:, 2:], labels=labels)
    with pytest.raises(InputError, match="images of 10×11 pixels; scores by SSIM need 11×11 at least"):
        drawn("npz", [0, 1], 2, str(tmp_path / "small.npz"))
    np.savez(tmp_path / "short.npz", images=images, labels=labels[:-1])
    with pytest.raises(InputError, match=r"short.npz: labels \(7,\) do not match images \(8, 12, 11\)"):
        drawn("npz", [0, 1], 2, str(tmp_path / "short.npz"))
    np.savez(tmp_path / "wide.npz", images=images * 300, labels=labels)
    with pytest.raises(InputError, match="must be uint8, or float in"):
        drawn("npz", [0, 1], 2, str(tmp_path / "wide.npz"))
    for nothing in ((images[:0], labels[:0]), (images[:, :0], labels)):
        np.savez(tmp_path / "empty.npz", images=nothing[0], labels=nothing[1])
        with pytest.raises(InputError, match=r"empty.npz: labels \([08],\)"):
            drawn("npz", [0, 1], 2, str(tmp_path / "empty.npz"))
    np.savez(tmp_path / "five.npz", images=np.repeat(images[:, None], 5, axis=1), labels=labels)
    with pytest.raises(InputError, match="images of 5 channels; grey ones have one, colour ones three"):
        drawn("npz", [0, 1], 2, str(tmp_path / "five.npz"))
    (tmp_path / "text.npz").write_text("no")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:100])
    np.save(tmp_path / "array.npy", images)
    np.savez_compressed(tmp_path / "flipped.npz", images=images, labels=labels)
    content = bytearray((tmp_path / "flipped.npz").read_bytes())
    content[100] ^= 255
    content[101] ^= 255
    (tmp_path / "flipped.npz").write_bytes(content)
    for name in ("text.npz", "cut.npz", "flipped.npz", "array.npy"):
        with pytest.raises(InputError, match="not an npz file"):
            drawn("npz", [0, 1], 2, str(tmp_path / name))
    for classes in ([], [0], [0, 1, 1]):
        with pytest.raises(InputError, match="must name at least two classes, and each once"):
            drawn("npz", classes, 2, str(tmp_path / "good.npz"))
    with pytest.raises(InputError, match="per_class=1 is too few"):
        drawn("npz", [0, 1], 1, str(tmp_path / "good.npz"))
