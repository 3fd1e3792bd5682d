"""Data from other sources than a folder is the same; data that cannot be used is refused before training."""

import json
import shutil
import tarfile

import datasets
import pytest
from PIL import Image

from latte_flow_hf.training.data import (
    CaptionedImageDataset,
    CaptionedImageStream,
    ImageRows,
    UnreadableImages,
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

    # A missing caption, an empty folder.
    uncaptioned = tmp_path / "uncaptioned"
    shutil.copytree(images, uncaptioned)
    lines = [json.loads(line) for line in (uncaptioned / "metadata.jsonl").read_text().splitlines()]
    lines[3]["text"] = None
    (uncaptioned / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    fails("03.png has no caption", data={"source": {**source, "data_dir": str(uncaptioned)}})
    (tmp_path / "empty").mkdir()
    fails("", data={"source": {**source, "data_dir": str(tmp_path / "empty")}})
    fails("nowhere", model={"pipeline": str(tmp_path / "nowhere")})


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
