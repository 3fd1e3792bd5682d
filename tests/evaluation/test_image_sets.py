"""Image sets are read as they are, in batches; files in ADM's layout are read back as its evaluator reads them."""

import zipfile

import numpy as np
import pytest
from PIL import Image

from latte_flow_hf.evaluation.image_sets import open_images, write_npz


IMAGES = np.random.default_rng(0).integers(0, 256, (7, 8, 12, 3), dtype=np.uint8)


def read_as_adm(path, batch_size):
    """What `StreamingNpzArrayReader` of ADM's evaluator does, which only reads versions 1 and 2, in C order."""
    batches = []
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
        assert np.lib.format.read_magic(member) == (1, 0)
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(member)
        assert not is_fortran and dtype == np.uint8
        for start in range(0, shape[0], batch_size):
            size = min(batch_size, shape[0] - start)
            content = member.read(size * int(np.prod(shape[1:])))
            batches.append(np.frombuffer(content, dtype).reshape(size, *shape[1:]))
        assert member.read() == b""
    return batches


def read(images, batch_size=3):
    batches = list(images.read(batch_size))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    return np.concatenate(batches)


def test_a_written_file_is_read_as_the_evaluators_read_it(tmp_path):
    path = tmp_path / "samples.npz"
    labels = np.arange(7)
    write_npz(path, (IMAGES[start : start + 2] for start in range(0, 7, 2)), 7, arr_1=labels)
    with np.load(path) as arrays:
        assert (arrays["arr_0"] == IMAGES).all() and (arrays["arr_1"] == labels).all()
    assert [len(batch) for batch in read_as_adm(path, 4)] == [4, 3]
    assert (np.concatenate(read_as_adm(path, 4)) == IMAGES).all()
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]


def test_all_kinds_of_sets_have_the_same_pixels(tmp_path):
    np.savez_compressed(tmp_path / "compressed.npz", arr_0=IMAGES, arr_1=np.arange(7))
    write_npz(tmp_path / "plain.npz", [IMAGES], 7)
    folder = tmp_path / "folder"
    for index, image in enumerate(IMAGES):
        path = folder / f"{index // 3}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_text("no image")
    sources = [
        IMAGES,
        [Image.fromarray(image) for image in IMAGES],
        folder,
        tmp_path / "compressed.npz",
        str(tmp_path / "plain.npz"),
    ]
    for source in sources:
        images = open_images(source)
        assert (images.num_images, images.height, images.width) == (7, 8, 12)
        assert (read(images) == IMAGES).all()
        assert (read(images) == IMAGES).all(), "a set can be read again"
    assert [path.name for path in open_images(folder).paths] == [f"{index}.png" for index in range(7)]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (IMAGES.astype(np.float32), "uint8, 0 to 255, got float32"),
        (np.where(IMAGES > 100, np.nan, IMAGES), "NaN"),
        (IMAGES[0], r"\(n, height, width, 3\), got \(8, 12, 3\)"),
        (IMAGES[:0], r"got \(0, 8, 12, 3\)"),
        (IMAGES.transpose(0, 3, 1, 2), r"got \(7, 3, 8, 12\)"),
    ],
)
def test_other_arrays_are_refused(array, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_images(array)
    if "NaN" not in message:
        np.savez(tmp_path / "images.npz", arr_0=array)
        with pytest.raises(ValueError, match=f"images.npz: arr_0 must.*{message}"):
            open_images(tmp_path / "images.npz")


def test_sizes_must_be_equal(tmp_path):
    for name, size in (("a.png", (8, 8)), ("b.png", (8, 8)), ("c.png", (9, 8))):
        Image.new("RGB", size).save(tmp_path / name)
    with pytest.raises(ValueError, match=r"a.png has 8x8 pixels, c.png has 9x8; resize"):
        open_images(tmp_path)
    with pytest.raises(ValueError, match="image 0 has 8x8 pixels, image 1 has 9x8"):
        open_images([Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))])
    with pytest.raises(ValueError, match="images must be of one size"):
        write_npz(tmp_path / "x.npz", [IMAGES, IMAGES[:, :4]], 14)
    assert not (tmp_path / "x.npz").exists()


def test_an_image_lying_on_its_side_has_another_size(tmp_path):
    Image.new("RGB", (12, 8)).save(tmp_path / "a.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (12, 8)).save(tmp_path / "b.jpg", exif=exif)
    with pytest.raises(ValueError, match=r"b.jpg has 8x12"):
        list(open_images(tmp_path).read(2))


def test_unusable_sources_are_refused(tmp_path, text_file):
    with pytest.raises(FileNotFoundError, match="nowhere do not exist"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"picture.png cannot be read"):
        open_images(tmp_path)
    with pytest.raises(ValueError, match=r"folder or an .npz file"):
        open_images(text_file)
    text_file.unlink()
    # A header of 65,536 x 65,536 pixels.
    Image.new("RGB", (8, 8)).save(tmp_path / "huge.bmp")
    content = bytearray((tmp_path / "huge.bmp").read_bytes())
    content[18:26] = b"\0\0\1\0" * 2
    (tmp_path / "huge.bmp").write_bytes(content)
    with pytest.raises(ValueError, match=r"huge.bmp cannot be read: Image size"):
        open_images(tmp_path)
    (tmp_path / "huge.bmp").unlink()
    with pytest.raises(ValueError, match="contains no images"):
        open_images(tmp_path)
    with pytest.raises(ValueError, match="at least one image"):
        open_images([])
    with pytest.raises(ValueError, match="mode L"):
        open_images([Image.new("L", (8, 8))])
    (tmp_path / "text.npz").write_text("this is no archive")
    with pytest.raises(OSError, match=r"text.npz is truncated, or no .npz"):
        open_images(tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match="must have the array `arr_0`, got mu"):
        open_images(tmp_path / "other.npz")
    with pytest.raises(ValueError, match="num_images is 8, but there are 7"):
        write_npz(tmp_path / "short.npz", [IMAGES], 8)
    assert not (tmp_path / "short.npz").exists()


def test_a_damaged_file_is_noticed(tmp_path):
    path = tmp_path / "images.npz"
    write_npz(path, [IMAGES], 7)
    content = bytearray(path.read_bytes())
    content[content.index(IMAGES[3].tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(OSError, match="truncated or damaged"):
        list(open_images(path).read(3))
