"""Sets in folders, each in its publisher's layout, against torchvision's reading where it has one."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.data import Data, Item, folder, imagenet, imagenet_s, mura, pet, selected
from libragrad_fx.evaluate.data.folders import synsets
from tests.evaluate.pictures import mask, picture, put

datasets = pytest.importorskip("torchvision.datasets", reason="torchvision is not installed")
WNIDS = ("n01440764", "n02391049", "n02504458")  # tench, zebra, African elephant
INDICES = (0, 340, 386)
RNG = np.random.default_rng(0)
SHAPE = (8, 12)


def items(data: Data) -> list[Item]:
    """All samples, by way of another process."""
    again = pickle.loads(pickle.dumps(data))
    return [again.get(i) for i in range(again.count)]


def ellipse(high: int = 8, wide: int = 12) -> np.ndarray:
    y, x = np.ogrid[:high, :wide]
    return (x - 5) ** 2 + (y - 3) ** 2 < 10


# --- any folder


def test_classes_and_order_are_those_of_torchvision(tmp_path: Path) -> None:
    for name in ("b", "a-b", "a", "C"):
        for i in range(3):
            put(tmp_path / name / f"{i}{name}.png", picture(i))
    put(tmp_path / "a" / "deep" / "x.JPEG", picture(9))
    wanted = datasets.ImageFolder(str(tmp_path))
    data = folder(tmp_path)
    assert list(data.classes) == wanted.classes
    found = [(item.id, item.label) for item in items(data)]
    said = [(Path(f).relative_to(tmp_path).as_posix(), label) for f, label in wanted.samples]
    assert sorted(found) == sorted(said)
    for item in items(data)[:3]:
        assert np.array_equal(np.asarray(item.content), np.asarray(Image.open(tmp_path / item.id)))


def test_hidden_files_are_none_and_an_empty_class_keeps_its_place(tmp_path: Path) -> None:
    put(tmp_path / "z" / "x.png", picture(0))
    (tmp_path / "z" / "._x.png").write_bytes(b"Mac OS X")
    (tmp_path / "z" / "notes.txt").write_text("no picture", "utf-8")
    put(tmp_path / ".ipynb_checkpoints" / "x.png", picture(0))
    put(tmp_path / "z" / ".thumbnails" / "x.png", picture(0))
    (tmp_path / "m").mkdir()
    data = folder(tmp_path)
    assert data.classes == ("m", "z")
    assert [(item.id, item.label) for item in items(data)] == [("z/x.png", 1)]


def test_links_are_followed(tmp_path: Path) -> None:
    put(tmp_path / "real" / "x.png", picture(0))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "real", target_is_directory=True)
    assert [item.id for item in items(folder(tmp_path / "set"))] == ["cat/x.png"]


def test_masks_of_pictures_with_classes(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        put(tmp_path / "images" / name / "x.jpg", picture(1))
        put(tmp_path / "masks" / name / "x.png", mask(ellipse() * (255 if name == "cat" else 1)))
    put(tmp_path / "images" / "dog" / "y.jpg", picture(2))
    found = {item.id: item for item in items(folder(tmp_path))}
    assert [*found] == ["cat/x.jpg", "dog/x.jpg", "dog/y.jpg"]
    assert np.array_equal(found["cat/x.jpg"].masks[0], ellipse())
    assert np.array_equal(found["dog/x.jpg"].masks[1], ellipse())
    assert found["dog/y.jpg"].masks == {}
    assert sorted(selected(folder(tmp_path), None, 0, "masked").ids) == ["cat/x.jpg", "dog/x.jpg"]


def test_masks_by_value_without_classes(tmp_path: Path) -> None:
    values = RNG.integers(0, 5, SHAPE)
    put(tmp_path / "x.jpg", picture(1))
    put(tmp_path / "drawn" / "x.png", mask(values))
    (item,) = items(folder(tmp_path, masks="drawn", values={1: 7, 2: 7, 3: 9}))
    assert item.label is None
    assert sorted(item.masks) == [7, 9]
    assert np.array_equal(item.masks[7], (values == 1) | (values == 2))
    with pytest.raises(InputError, match="need values"):
        folder(tmp_path, masks="drawn")


@pytest.mark.parametrize("kind", ["L", "P", "1", "I;16", "RGB", "RGBA", "LA"])
def test_modes_of_masks(tmp_path: Path, kind: str) -> None:
    inside = ellipse()
    image = mask(inside * 1)
    if kind == "P":
        image = Image.fromarray(inside.astype(np.uint8)).convert("P")
        image.putdata(inside.astype(int).ravel().tolist())
        image.putpalette([9, 9, 9, 0, 0, 0])  # black is 1: it is the index that counts
    elif kind == "I;16":
        image = Image.fromarray(inside.astype(np.uint16) * 256)
    else:
        image = Image.fromarray((inside * 255).astype(np.uint8)).convert(kind)
    put(tmp_path / "images" / "cat" / "x.jpg", picture(1))
    put(tmp_path / "masks" / "cat" / "x.png", image)
    (item,) = items(folder(tmp_path))
    assert np.array_equal(item.masks[0], inside)


def test_masks_that_fit_nothing_or_two(tmp_path: Path) -> None:
    put(tmp_path / "images" / "cat" / "x.jpg", picture(1))
    put(tmp_path / "masks" / "cat" / "x_mask.png", mask(ellipse() * 1))
    with pytest.raises(InputError, match=r"no mask in .* has a picture's path"):
        folder(tmp_path)
    put(tmp_path / "masks" / "cat" / "x.png", mask(ellipse() * 1))
    put(tmp_path / "images" / "cat" / "x.png", picture(1))
    with pytest.raises(InputError, match=r"fits cat/x\.jpg and cat/x\.png"):
        folder(tmp_path)
    (tmp_path / "images" / "cat" / "x.png").unlink()
    put(tmp_path / "masks" / "cat" / "x.bmp", mask(ellipse() * 1))
    with pytest.raises(InputError, match="masks of one picture"):
        folder(tmp_path)


def test_a_mask_as_jpeg_is_refused(tmp_path: Path) -> None:
    """Its values are no longer those that were drawn."""
    put(tmp_path / "images" / "cat" / "x.jpg", picture(1))
    (tmp_path / "masks" / "cat").mkdir(parents=True)
    mask(ellipse() * 255).save(tmp_path / "masks" / "cat" / "x.png", "JPEG")
    with pytest.raises(InputError, match="as a mask"):
        folder(tmp_path).get(0)


@pytest.mark.parametrize("how", range(1, 9))
def test_a_mask_turns_with_its_picture(tmp_path: Path, how: int) -> None:
    """A camera's mark says how a picture is to be turned. A mask on the stored pixels turns with it."""
    exif = Image.Exif()
    exif[0x0112] = how
    inside = ellipse()
    stored = Image.fromarray((inside * 255).astype(np.uint8)).convert("RGB")
    put(tmp_path / "images" / "cat" / "x.png", stored, exif=exif)
    put(tmp_path / "masks" / "cat" / "x.png", mask(inside * 1))
    if how in (2, 3, 4):
        with pytest.raises(InputError, match=f"orientation {how}.* may or may not be turned"):
            folder(tmp_path).get(0)
        return
    (item,) = items(folder(tmp_path))
    assert np.array_equal(np.asarray(item.content)[..., 0] > 0, item.masks[0])
    upright = np.asarray(item.content)[..., 0] > 0
    put(tmp_path / "masks" / "cat" / "x.png", mask(upright * 1))
    assert np.array_equal(folder(tmp_path).get(0).masks[0], upright)


def test_a_mask_of_another_size(tmp_path: Path) -> None:
    put(tmp_path / "images" / "cat" / "x.png", picture(0))
    put(tmp_path / "masks" / "cat" / "x.png", mask(ellipse(7, 12) * 1))
    with pytest.raises(InputError, match="is 12 x 8, and its mask 12 x 7"):
        folder(tmp_path).get(0)


def test_empty_and_mixed_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no pictures in .*CLASS/x.jpg"):
        folder(tmp_path)
    with pytest.raises(InputError, match=r"there is no .*CLASS/x.jpg"):
        folder(tmp_path / "nowhere")
    put(tmp_path / "cat" / "x.png", picture(0))
    put(tmp_path / "banner.png", picture(0))
    with pytest.raises(InputError, match=r"banner.png lies beside folders of classes"):
        folder(tmp_path)


# --- what stands in one file alone


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "LA", "1", "RGBA"])
def test_pictures_in_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    ending = "jpg" if mode == "CMYK" else "png"
    put(tmp_path / "a" / f"x.{ending}", picture(0, mode=mode))
    data = folder(tmp_path)
    assert data.get(0).content.mode == "RGB"  # pyright: ignore[reportAttributeAccessIssue]
    assert data.peek(0).mode == mode


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    put(tmp_path / "a" / "x.png", Image.fromarray(np.full((4, 4), 65535 // 2, np.uint16)))
    assert np.asarray(folder(tmp_path).get(0).content)[0, 0].tolist() == [127, 127, 127]


def test_one_broken_picture_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    for i in range(3):
        put(tmp_path / "a" / f"{i}.jpg", picture(i, (40, 40)))
    whole = (tmp_path / "a" / "1.jpg").read_bytes()
    (tmp_path / "a" / "1.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "a" / "2.jpg").write_bytes(b"")
    data = folder(tmp_path)
    assert data.get(0).id == "a/0.jpg"
    for i in (1, 2):
        with pytest.raises(InputError, match=rf"{i}\.jpg"):
            data.get(i)
    assert len(selected(data, 3, 0, "rgb")) == 3
    (tmp_path / "a" / "0.jpg").unlink()
    with pytest.raises(InputError, match=r"no image file .*0\.jpg"):
        data.get(0)
    assert data.peek(0).sha256 == ""


# --- ImageNet


def test_imagenet_in_folders_has_the_indices_of_all_1000(tmp_path: Path) -> None:
    """torchvision's ``ImageFolder`` would count the three folders that are there."""
    for k, name in enumerate(WNIDS):
        put(tmp_path / "val" / name / f"ILSVRC2012_val_0000000{k + 1}.JPEG", picture(k))
    data = imagenet(tmp_path)
    assert [item.label for item in items(data)] == [*INDICES]
    assert data.get(0).id == "ILSVRC2012_val_00000001.JPEG"
    assert len(data.classes) == 1000
    assert "zebra" in data.classes[340]
    put(tmp_path / "val" / "n00000000" / "x.JPEG", picture(0))
    with pytest.raises(InputError, match="ImageNet has no class n00000000"):
        imagenet(tmp_path)


def flat(root: Path) -> list[int]:
    """Three pictures as unpacked, in an order that is not that of their classes."""
    order = (2, 0, 1)
    for n in range(1, 4):
        put(root / f"ILSVRC2012_val_{n:08d}.JPEG", picture(n))
    return [INDICES[k] for k in order]


def kit() -> dict[str, bytes]:
    """The development kit's two files: ILSVRC's own ids are in no order, and some are no classes."""
    scipy = pytest.importorskip("scipy.io", reason="scipy is not installed")
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    leaves = [(7, WNIDS[2], "elephant", 0), (3, WNIDS[0], "tench", 0), (9, WNIDS[1], "zebra", 0)]
    rows = [*leaves, (12, "n9", "animals", 4)]
    meta = np.array(rows, dtype=kind).reshape(-1, 1)
    made = io.BytesIO()
    scipy.savemat(made, {"synsets": meta})
    return {"meta.mat": made.getvalue(), "ILSVRC2012_validation_ground_truth.txt": b"7\n3\n9\n"}


@pytest.mark.parametrize("way", ["csv", "kit", "packed", "kaggle"])
def test_imagenet_as_unpacked(tmp_path: Path, way: str) -> None:
    inner = tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "val" if way == "kaggle" else tmp_path / "val"
    wanted = flat(inner)
    if way in ("csv", "kaggle"):
        rows = "".join(
            f"ILSVRC2012_val_{n:08d},{WNIDS[k]} 1 2 3 4 \n" for n, k in enumerate((2, 0, 1), 1)
        )
        (tmp_path / "LOC_val_solution.csv").write_text(f"ImageId,PredictionString\n{rows}", "utf-8")
    elif way == "kit":
        place = tmp_path / "ILSVRC2012_devkit_t12" / "data"
        place.mkdir(parents=True)
        for name, body in kit().items():
            (place / name).write_bytes(body)
    else:
        with tarfile.open(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as made:
            for name, body in kit().items():
                about = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
                about.size = len(body)
                made.addfile(about, io.BytesIO(body))
    assert [item.label for item in items(imagenet(tmp_path))] == wanted


def test_imagenet_without_labels_or_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"registration at image-net.org"):
        imagenet(tmp_path / "nowhere")
    flat(tmp_path / "val")
    with pytest.raises(InputError, match=r"pictures and no labels.*devkit"):
        imagenet(tmp_path)
    kit_or_list = {"ILSVRC2012_devkit_t12.tar.gz": b"no archive", "LOC_val_solution.csv": b"a,b\n1,2\n"}
    for name, body in kit_or_list.items():
        (tmp_path / name).write_bytes(body)
        with pytest.raises(InputError, match=rf"cannot read .*{name}: .*image-net.org"):
            imagenet(tmp_path)


def test_two_pictures_of_one_name(tmp_path: Path) -> None:
    for name in WNIDS[:2]:
        put(tmp_path / name / "x.JPEG", picture(0))
    with pytest.raises(InputError, match=r"2 pictures are called 'x\.JPEG'"):
        imagenet(tmp_path)


# --- ImageNet-S


def imagenet_s_of_50(root: Path) -> np.ndarray:
    """Fifty folders, two of them with a picture. Ids in masks are ranks in the sorted WordNet ids."""
    names = sorted({*WNIDS[:2], *[*synsets()][:49]})[:50]
    ids = np.full(SHAPE, 0)
    ids[:2] = names.index(WNIDS[0]) + 1
    ids[2:5] = names.index(WNIDS[1]) + 1
    ids[5:6] = 1000
    for name in names:
        put(root / "validation-segmentation" / name / f"z{name}.png", mask(np.zeros(SHAPE, int)))
    put(root / "validation-segmentation" / WNIDS[0] / "ILSVRC2012_val_00000002.png", mask(ids))
    put(root / "validation" / WNIDS[0] / "ILSVRC2012_val_00000002.JPEG", picture(2))
    put(root / "validation-segmentation" / WNIDS[1] / "ILSVRC2012_val_00000001.png", mask(ids))
    put(root / "validation" / WNIDS[1] / "ILSVRC2012_val_00000001.JPEG", picture(1))
    return ids


def test_imagenet_s_masks_are_by_class_of_imagenet(tmp_path: Path) -> None:
    ids = imagenet_s_of_50(tmp_path)
    first, second = items(imagenet_s(tmp_path))
    assert (first.id, first.label) == ("ILSVRC2012_val_00000001.JPEG", 340)  # sorted by name, not by folder
    assert (second.id, second.label) == ("ILSVRC2012_val_00000002.JPEG", 0)
    for item in (first, second):
        assert sorted(item.masks) == [0, 340]  # neither 0 nor 1000
        for index, rows in ((0, slice(0, 2)), (340, slice(2, 5))):
            wanted = np.zeros(SHAPE, bool)
            wanted[rows] = True
            assert np.array_equal(item.masks[index], wanted)
    assert ids.max() == 1000


def test_imagenet_s_with_pictures_elsewhere(tmp_path: Path) -> None:
    imagenet_s_of_50(tmp_path / "s")
    put(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG", picture(3))
    (item,) = items(imagenet_s(tmp_path / "s", images=tmp_path / "val"))
    assert item.id == "ILSVRC2012_val_00000001.JPEG"
    assert np.array_equal(
        np.asarray(item.content), np.asarray(Image.open(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG"))
    )
    put(tmp_path / "val" / "again" / "ILSVRC2012_val_00000001.JPEG", picture(3))
    with pytest.raises(InputError, match="have one name"):
        imagenet_s(tmp_path / "s", images=tmp_path / "val")


def test_imagenet_s_ids_are_not_guessed_from_a_part(tmp_path: Path) -> None:
    put(tmp_path / "validation-segmentation" / WNIDS[1] / "a.png", mask(np.full(SHAPE, 1)))
    put(tmp_path / "validation" / WNIDS[1] / "a.JPEG", picture(0))
    with pytest.raises(InputError, match=r"folders of 50, 300, 919 classes, not 1: give categories"):
        imagenet_s(tmp_path)
    (tmp_path / "ids.txt").write_text("\n".join(reversed(WNIDS)), "utf-8")
    (item,) = items(imagenet_s(tmp_path, categories=tmp_path / "ids.txt"))
    assert [*item.masks] == [0]  # by sorted ids, whatever order the file has
    (tmp_path / "ids.txt").write_text("\n".join([*synsets()][:300]), "utf-8")
    put(tmp_path / "validation-segmentation" / WNIDS[1] / "a.png", mask(np.full(SHAPE, 290)))
    (item,) = items(imagenet_s(tmp_path, categories=tmp_path / "ids.txt"))
    assert [*item.masks] == [289]
    with pytest.raises(InputError, match=r"LUSSeg/ImageNet-S"):
        imagenet_s(tmp_path / "nowhere")


# --- MURA, Pet


def test_mura(tmp_path: Path) -> None:
    base = tmp_path / "MURA-v1.1" / "valid"
    put(base / "XR_WRIST" / "patient1" / "study1_positive" / "image1.png", picture(0, mode="L"))
    put(base / "XR_ELBOW" / "patient2" / "study1_negative" / "image1.png", picture(1, mode="L"))
    (base / "XR_WRIST" / "patient1" / "study1_positive" / "._image1.png").write_bytes(b"Mac OS X")
    for root in (tmp_path, tmp_path / "MURA-v1.1"):
        data = mura(root)
        assert [(item.id, item.label) for item in items(data)] == [
            ("valid/XR_ELBOW/patient2/study1_negative/image1.png", 0),
            ("valid/XR_WRIST/patient1/study1_positive/image1.png", 1),
        ]
        assert data.classes == ("negative", "positive")
    put(base / "XR_WRIST" / "patient3" / "image1.png", picture(0))
    with pytest.raises(InputError, match="in no study_negative or study_positive"):
        mura(tmp_path)
    with pytest.raises(InputError, match="stanfordmlgroup"):
        mura(tmp_path / "nowhere")


def test_pet_is_what_torchvision_reads(tmp_path: Path) -> None:
    base = tmp_path / "oxford-iiit-pet"
    rows = [("Abyssinian_1", 1, 1), ("american_bulldog_10", 2, 2), ("Abyssinian_2", 1, 1)]
    for k, (name, _, _) in enumerate(rows):
        put(base / "images" / f"{name}.jpg", picture(k))
        put(base / "annotations" / "trimaps" / f"{name}.png", mask(RNG.integers(1, 4, SHAPE)))
    lines = "".join(f"{name} {label} {kind} 1\n" for name, label, kind in rows)
    (base / "annotations" / "test.txt").write_text(lines, "utf-8")
    wanted = datasets.OxfordIIITPet(str(tmp_path), "test", ("category", "segmentation"))
    data = pet(tmp_path, "test")
    assert list(data.classes) == wanted.classes
    assert len(wanted) == data.count
    for item, (image, (label, drawn)) in zip(items(data), wanted, strict=True):
        assert np.array_equal(np.asarray(item.content), np.asarray(image))
        assert item.label == label
        assert np.array_equal(item.masks[label], np.asarray(drawn) == 1)
    for split, body in (("trainval", None), ("test", "Abyssinian_1 cat 1 1\n"), ("test", "# no line\n\n")):
        if body:
            (base / "annotations" / f"{split}.txt").write_text(body, "utf-8")
        with pytest.raises(InputError, match=r"OxfordIIITPet\(ROOT, download=True\)"):
            pet(tmp_path, split)
