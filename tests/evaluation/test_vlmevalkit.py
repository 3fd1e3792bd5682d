"""VLMEvalKit runs a local task on the model and on its stock backbone, with the same answers.

VLMEvalKit is not on the package index: this file runs where a clone of it can be imported.
"""

import base64
import io

import pytest
import torch


pytest.importorskip("vlmeval", reason="needs a clone of VLMEvalKit on the path, and its requirements")

from vlmeval.config import supported_VLM
from vlmeval.dataset import build_dataset
from vlmeval.inference import infer_data_job
from vlmeval.smp import get_pred_file_path, load

from latte_flow_hf import LatteFlowPipeline, tiny_checkpoint
from latte_flow_hf.conversion import extract_backbone
from latte_flow_hf.evaluation import tinyworld
from latte_flow_hf.evaluation.vlmevalkit import LatteFlowVLM, register


# VLMEvalKit turns gradients off for the whole process.
torch.set_grad_enabled(True)

NUM_QUESTIONS = 16


@pytest.fixture(scope="module")
def questions():
    rows = [row for questions in tinyworld.understanding_questions(1, 8).values() for row in questions]
    return rows[:: len(rows) // NUM_QUESTIONS][:NUM_QUESTIONS]


@pytest.fixture
def table(questions, tmp_path, monkeypatch):
    """In the folder where VLMEvalKit looks for tasks that it does not know."""

    def encode(image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return base64.b64encode(buffer.getvalue()).decode()

    rows = ["index\tquestion\tanswer\timage"]
    rows += [
        f"{index}\t{item.question}\t{item.answer}\t{encode(image)}" for index, (image, item) in enumerate(questions)
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tinyworld.tsv").write_text("\n".join(rows))
    monkeypatch.setenv("LMUData", str(tmp_path / "data"))


def test_answers_are_those_of_the_stock_backbone(questions, table, tmp_path):
    extract_backbone(tiny_checkpoint()).write(tmp_path / "backbone")
    answers = {}
    for name, source in (("ours", tiny_checkpoint()), ("stock", str(tmp_path / "backbone"))):
        register(name, pretrained=source, device="cpu", max_new_tokens=24)
        try:
            infer_data_job(name, str(tmp_path), name, build_dataset("tinyworld"))
        finally:
            del supported_VLM[name]
        results = load(get_pred_file_path(str(tmp_path), name, "tinyworld", use_env_format=True))
        answers[name] = list(results["prediction"])
    pipe = LatteFlowPipeline.from_pretrained(tiny_checkpoint())
    asked = [pipe.chat(item.question, images=image, do_sample=False, max_new_tokens=24) for image, item in questions]
    assert answers["ours"] == answers["stock"] == asked
    assert sum(answer == item.answer for answer, (_, item) in zip(asked, questions)) / NUM_QUESTIONS > 0.8


def test_conversations_and_several_images(questions):
    model = LatteFlowVLM(device="cpu", max_new_tokens=8)
    pipe = LatteFlowPipeline.from_pretrained(tiny_checkpoint())
    image, other = questions[0][0], questions[-1][0]
    turns = [("user", [image, "what is this?"]), ("assistant", ["a red circle"]), ("user", [other, "and this?"])]

    def parts(values, key):
        return [
            {"type": "text", key or "text": value}
            if isinstance(value, str)
            else {"type": "image", key or "image": value}
            for value in values
        ]

    ours = [{"role": role, "content": parts(values, None)} for role, values in turns]
    theirs = [{"role": role, "content": parts(values, "value")} for role, values in turns]
    expected = pipe.chat(ours, do_sample=False, max_new_tokens=8)
    assert model.chat_inner(theirs) == expected
    flat = [{**part, "role": message["role"]} for message in theirs for part in message["content"]]
    assert model.generate_inner(flat) == expected


def test_what_cannot_be_asked():
    with pytest.raises(ValueError, match="top_q"):
        LatteFlowVLM(top_q=1)
    model = LatteFlowVLM(device="cpu")
    with pytest.raises(ValueError, match="a part of type 'video'"):
        model.generate_inner([{"type": "video", "value": "film.mp4"}])
    with pytest.raises(ValueError, match="must have text or an image"):
        model.generate_inner([{"type": "text", "value": ""}])
    with pytest.raises(ValueError, match="has a model 'GPT4V' already"):
        register("GPT4V")
