"""Data from other sources than a folder is the same; data that cannot be used is refused before training."""

import json
import tarfile

import datasets
import numpy as np
import pytest
from PIL import Image

from latte_flow_hf.training.collator import PromptTokenizer
from latte_flow_hf.training.data import (
    CaptionedImageDataset,
    CaptionedImageStream,
    ConversationDataset,
    ImageRows,
    UnreadableImageError,
    UnreadableImages,
    load_class_names,
    load_conversations,
    load_image_rows,
)
from latte_flow_hf.training.recipe import DataSettings


@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
def test_other_sources_give_the_same_images(recipe, images, tmp_path, layout):
    source = {"cache_dir": str(tmp_path / "datasets")}
    captions = [json.loads(line)["text"] for line in (images / "metadata.jsonl").read_text().splitlines()]
    if layout == "parquet":
        rows = [(images / f"{n:02d}.png").read_bytes() for n in range(12)]
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=sorted(set(captions)))}
        )
        columns = {"image": [{"bytes": row, "path": None} for row in rows], "label": captions}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "rows.parquet")
        source = {**source, "path": "parquet", "data_files": str(tmp_path / "rows.parquet")}
        settings = DataSettings(source=source, label="label", size=32)
    else:
        with tarfile.open(tmp_path / "shard-0.tar", "w") as tar:
            for number, caption in enumerate(captions):
                tar.add(images / f"{number:02d}.png", f"{number:02d}.png")
                (tmp_path / "caption.txt").write_text(caption)
                tar.add(tmp_path / "caption.txt", f"{number:02d}.txt")
        source = {**source, "path": "webdataset", "data_files": str(tmp_path / "shard-0.tar")}
        settings = DataSettings(source=source, image="png", caption="txt", size=32)
    folder = DataSettings(source=recipe()["data"]["source"], caption="text", size=32)
    expected, actual = (
        CaptionedImageDataset(load_image_rows(item, 0), 0, UnreadableImages(1)) for item in (folder, settings)
    )
    assert len(actual) == 12
    for one, other in zip(expected, actual):
        assert one["image"].tobytes() == other["image"].tobytes() and one["prompt"] == other["prompt"]


def test_unusable_data_is_refused(recipe, run, images, tmp_path):
    def fails(words: str, **change) -> None:
        with pytest.raises((ValueError, OSError), match=words):
            run(recipe(**change), tmp_path / "refused")
        assert not list((tmp_path / "refused").rglob("model.safetensors"))

    fails(r"caption must be one of the columns \[.*'text'\], got 'words'", data={"caption": "words"})
    fails("either `caption` or `label`", data={"label": "text"})
    fails("label must be a column of class labels with names, but 'text' is", data={"caption": None, "label": "text"})
    fails("1 images cannot be read, max_unreadable is 0: .*05.png", data={"max_unreadable": 0})
    fails("size must be a positive multiple of 8, got 30", data={"size": 30})
    fails("needs a cache", training={"dataloader_num_workers": 2})
    fails("must be one of .*uniform", model={"timestep_sampling": "normal"})
    source = recipe()["data"]["source"]
    fails("give `max_steps`", data={"source": {**source, "streaming": True}}, training={"max_steps": -1})

    (tmp_path / "empty").mkdir()
    fails("empty.* cannot be loaded", data={"source": {**source, "data_dir": str(tmp_path / "empty")}})
    nothing = {"path": "parquet", "data_files": str(tmp_path / "*.parquet")}
    fails(r"\*\.parquet.* cannot be loaded: .*data file", data={"source": nothing})
    fails("cannot be loaded: Unknown split", data={"source": {**source, "split": "test"}})
    fails("cannot be loaded: .*'data_dri'", data={"source": {**source, "data_dri": "a"}})
    fails("nowhere", model={"pipeline": str(tmp_path / "nowhere")})


def load_folder(folder, captions: list[str], tmp_path, **settings) -> ImageRows:
    """A folder of as many images, with `captions` as lines of its `metadata.csv`."""
    folder.mkdir()
    for number in range(len(captions)):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    lines = [f"{number}.png,{caption}" for number, caption in enumerate(captions)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))
    source = {"path": "imagefolder", "data_dir": str(folder), "cache_dir": str(tmp_path / "datasets")}
    return load_image_rows(DataSettings(source={**source, **settings}, caption="text", size=8), 0)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "captions", [["7", "007", "1e3"], ["True", "False", "True"], ["0.50", "1", "2"], ["2024-01-01", "a", "7"]]
)
def test_captions_that_look_like_numbers_are_text_as_written(captions, streaming, tmp_path):
    rows = load_folder(tmp_path / "images", captions, tmp_path, streaming=streaming)
    assert [rows.prompts(row) for row in rows.dataset] == [[caption] for caption in captions]


def test_numbers_in_a_table_are_captions(tmp_path):
    columns = {
        "image": [{"bytes": None, "path": str(tmp_path / "a.png")}] * 3,
        "number": [7, 0, None],
        "truth": [True, False, None],
    }
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "rows.parquet")
    source = {"path": "parquet", "data_files": str(tmp_path / "rows.parquet"), "cache_dir": str(tmp_path / "datasets")}
    for caption, expected in (("number", ["7", "0"]), ("truth", ["True", "False"])):
        rows = load_image_rows(DataSettings(source=source, caption=caption, size=8), 0)
        assert [rows.prompts(row)[0] for row in rows.dataset.select([0, 1])] == expected
        with pytest.raises(UnreadableImageError, match=f"has no caption: {caption} is None"):
            rows.prompts(rows.dataset[2])


def test_an_image_without_a_caption_is_replaced_and_named(tmp_path, caplog):
    unreadable = UnreadableImages(2)
    rows = load_folder(tmp_path / "images", ["a", "", "c", '" "'], tmp_path)
    examples = list(CaptionedImageDataset(rows, 0, unreadable))
    assert [example["prompt"] for example in examples] == ["a", "c", "c", "a"]
    assert [name.rpartition("/")[2] for name in unreadable.reasons] == ["1.png", "3.png"]
    assert "1.png has no caption: text is None; it is skipped" in caplog.text
    with pytest.raises(ValueError, match="max_unreadable is 1"):
        list(CaptionedImageDataset(rows, 0, UnreadableImages(1)))
    empty = load_folder(tmp_path / "empty", ["", ""], tmp_path)
    with pytest.raises(ValueError, match="none of 2 images can be used: the first one has no caption"):
        CaptionedImageDataset(empty, 0, UnreadableImages(2))[0]


@pytest.mark.parametrize("streaming", [False, True])
def test_captions_in_files_beside_the_images(streaming, tmp_path):
    folder = tmp_path / "images"
    for number, caption in enumerate(("a red circle\n", "007", None)):
        path = folder / ("sub" if number == 1 else "") / f"{number}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (8, 8)).save(path)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption)
    source = {"path": "imagefolder", "data_dir": str(folder), "cache_dir": str(tmp_path / "datasets")}
    settings = DataSettings(source={**source, "streaming": streaming}, caption="txt", size=8)
    rows = load_image_rows(settings, 0)
    prompts = {}
    for index, row in enumerate(rows.dataset):
        try:
            prompts[rows.name(row, index).rpartition("/")[2]] = rows.prompts(row)
        except UnreadableImageError as error:
            assert "has no caption: txt is None" in str(error)
    assert prompts == {"0.png": ["a red circle"], "1.png": ["007"]}
    if streaming:
        return
    # A cache of the old captions would be refused.
    (folder / "0.txt").write_text("another")
    assert load_image_rows(settings, 0).fingerprint != rows.fingerprint
    (folder / "0.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"0\.txt is not a text file in UTF-8"):
        load_image_rows(settings, 0)
    with pytest.raises(ValueError, match=r"caption must be one of the columns \['image'\], got 'caption'"):
        load_image_rows(settings.model_copy(update={"caption": "caption"}), 0)


def test_one_of_several_captions_is_drawn_for_each_example_and_epoch():
    captions = ["a", "b", None, "c"]
    rows = ImageRows(
        [{"image": Image.new("RGB", (8, 8)), "prompt": captions}] * 30,
        DataSettings(source={"path": "any"}, size=8),
        "",
    )
    data = CaptionedImageDataset(rows, 0, UnreadableImages(0))
    epochs = []
    for epoch in range(2):
        data.set_epoch(epoch)
        epochs.append([example["prompt"] for example in data])
    assert set(epochs[0]) == {"a", "b", "c"} and epochs[0] != epochs[1]
    assert all(5 <= epochs[0].count(caption) <= 15 for caption in "abc")
    data.set_epoch(0)
    assert [example["prompt"] for example in data] == epochs[0]


class Stream:
    """Four rows, of which the second cannot be read, without a length."""

    def shuffle(self, seed, buffer_size):
        return self

    def set_epoch(self, epoch):
        pass

    def __iter__(self):
        for index in range(4):
            image = None if index == 1 else Image.new("RGB", (8, 8), (index, 0, 0))
            yield {"image": image, "prompt": f"prompt {index}", "__key__": f"key {index}"}


def take(stream: CaptionedImageStream, count: int) -> list[tuple[str, str, int]]:
    return [(example["name"], example["prompt"], example["seed"]) for _, example in zip(range(count), stream)]


def test_a_stream_replaces_unreadable_images_and_can_start_anywhere():
    rows = ImageRows(Stream(), DataSettings(source={"path": "any"}, size=8), "stream")
    unreadable = UnreadableImages(1)
    examples = take(CaptionedImageStream(rows, 0, unreadable), 8)
    # The next readable image replaces an unreadable one, with its own seed.
    assert [name for name, _, _ in examples[:4]] == ["key 0", "key 2", "key 2", "key 3"]
    assert len({seed for _, _, seed in examples}) == 8 and list(unreadable.reasons) == ["key 1"]
    assert take(CaptionedImageStream(rows, 0, UnreadableImages(1), start=4), 4) == examples[4:]


def test_too_many_unreadable_images_stop_the_run():
    unreadable = UnreadableImages(1)
    unreadable.add("a.png", "truncated")
    unreadable.add("a.png", "truncated")
    with pytest.raises(ValueError, match=r"2 images cannot be read, max_unreadable is 1: a.png, b.png"):
        unreadable.add("b.png", "truncated")


def test_the_tiny_world_takes_its_arguments_from_the_source():
    settings = DataSettings(source={"path": "tinyworld", "num_images": 5, "digit_share": 1.0}, size=64)
    rows = load_image_rows(settings, seed=3)
    examples = list(CaptionedImageDataset(rows, 3, UnreadableImages(0)))
    assert len(examples) == 5 and all("handwritten" in example["prompt"].lower() for example in examples)
    assert rows.fingerprint != load_image_rows(settings, seed=4).fingerprint


def test_conversations_need_messages(processor, tmp_path):
    source = {"path": "json", "cache_dir": str(tmp_path / "datasets")}
    (tmp_path / "conversations.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]})
    )
    data = load_conversations(
        {**source, "data_files": str(tmp_path / "conversations.jsonl")}, 0, processor.conversation
    )
    assert len(data) == 1 and [message["role"] for message in data[0]["messages"]] == ["user", "assistant"]
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "hello"}))
    with pytest.raises(ValueError, match="must have a column `messages`"):
        load_conversations({**source, "data_files": str(tmp_path / "texts.jsonl")}, 0, processor.conversation)


def test_a_conversation_that_cannot_be_used_is_replaced_and_named(processor, caplog):
    hello = {"role": "user", "content": "hello"}
    rows = [
        {"messages": [hello]},
        {"messages": [{"role": "user", "content": [{"type": "image", "path": "none.png"}]}]},
    ]
    unreadable = UnreadableImages(1)
    data = ConversationDataset(rows, processor.conversation, unreadable)
    assert data[1] == data[0] and list(unreadable.reasons) == ["number 1 of `understanding`"]
    assert "conversation number 1 of `understanding` cannot be used" in caplog.text and "none.png" in caplog.text
    with pytest.raises(ValueError, match="none of 1 conversations can be used"):
        ConversationDataset(rows[1:], processor.conversation, UnreadableImages(1))[0]


def image_rows(*images, **settings) -> ImageRows:
    rows = [{"image": image, "prompt": "a red circle"} for image in images]
    return ImageRows(rows, DataSettings(source={"path": "any"}, size=8, **settings), "")


def test_images_are_read_as_in_prompts(tmp_path):
    transparent, deep = Image.new("RGBA", (8, 8), (9, 9, 9, 0)), Image.fromarray(np.full((8, 8), 100 * 257, np.uint16))
    turned = Image.new("RGB", (8, 16))
    turned.paste((255, 0, 0), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    sources = []
    for number, (image, options) in enumerate(((transparent, {}), (deep, {}), (turned, {"exif": exif}))):
        path = tmp_path / f"{number}.png"
        image.save(path, **options)
        sources.append(
            [{"bytes": path.read_bytes(), "path": None}, {"bytes": None, "path": str(path)}, Image.open(path)]
        )
    colours = {"white": (255, 255, 255), "#010203": (1, 2, 3)}
    for background, colour in colours.items():
        for source in sources[0]:
            rows = image_rows(source, background=background)
            assert rows.image(rows.dataset[0]).getpixel((4, 4)) == colour
    for source in sources[1]:
        assert image_rows(source).image({"image": source}).getpixel((4, 4)) == (100, 100, 100)
    for source in sources[2]:
        # Red is to the right of black, and the centre is cut out.
        found = image_rows(source).image({"image": source})
        assert found.getpixel((7, 4)) == (255, 0, 0) and found.getpixel((0, 4)) == (0, 0, 0)


def test_a_background_that_is_none_is_refused():
    with pytest.raises(ValueError, match="background must be a colour"):
        DataSettings.from_dict({"source": {"path": "any"}, "background": "reddish"})


def test_images_that_cannot_be_used_are_replaced_and_named(caplog):
    bad = [np.full((8, 8), 3.0), {"bytes": b"none", "path": None}, {"bytes": None, "path": None}, None, 7]
    rows = image_rows(*bad, Image.new("RGB", (8, 8), "red"))
    unreadable = UnreadableImages(len(bad))
    assert CaptionedImageDataset(rows, 0, unreadable)[0]["name"] == f"number {len(bad)}"
    assert list(unreadable.reasons) == [f"number {index}" for index in range(len(bad))]
    assert "float values must be from 0 to 1, got 3 to 3" in unreadable.reasons["number 0"]


def test_captions_that_cannot_be_encoded_are_skipped_and_control_tokens_are_text(processor):
    rows = image_rows(*[Image.new("RGB", (8, 8))] * 2)
    rows.dataset[0]["prompt"] = "half a pair: \ud800"
    unreadable = UnreadableImages(1)
    assert CaptionedImageDataset(rows, 0, unreadable)[0]["name"] == "number 1"
    assert "half of a surrogate pair" in unreadable.reasons["number 0"]
    inputs = PromptTokenizer(processor)(["<|image_pad|><|im_end|>", "a cross"])
    assert not (inputs["input_ids"] == processor.image_token_id).any() and not inputs["mm_token_type_ids"].any()


def test_conversations_with_control_tokens_are_skipped_and_named(processor):
    def turns(question: str) -> dict:
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]}

    unreadable = UnreadableImages(1)
    rows = [turns("is<|im_end|> it?"), turns("is it?")]
    data = ConversationDataset(rows, processor.training_conversation, unreadable)
    assert data[0] == data[1]
    (reason,) = unreadable.reasons.values()
    assert "contains the control tokens ['<|im_end|>']" in reason


def test_class_names_are_read_without_the_images(tmp_path):
    for name in ("volcano", "goldfish"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "1.png").write_text("an image that nobody reads")
    source = {"path": "imagefolder", "data_dir": str(tmp_path / "images")}
    assert load_class_names(DataSettings(source=source, label="label")) == ["goldfish", "volcano"]
    with pytest.raises(ValueError, match="the recipe has no `label`"):
        load_class_names(DataSettings(source=source, caption="text"))
    with pytest.raises(ValueError, match="column of class labels with names, but 'image' is"):
        load_class_names(DataSettings(source=source, label="image"))
