"""lmms-eval runs its tasks on the model, and on its stock backbone with the same result.

lmms-eval needs other versions than the rest of the tests: docs/guides/understanding.md says how to make an environment
for this file.
"""

import json
import subprocess
import sys
from argparse import Namespace

import pytest
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner


pytest.importorskip("lmms_eval", reason="needs the extra lmms-eval, in an environment of its own")

from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model

from latte_flow_cli import app
from latte_flow_hf import LatteFlowPipeline, tiny_checkpoint
from latte_flow_hf.conversion import extract_backbone
from latte_flow_hf.evaluation.lmms_eval import LatteFlowChat, LatteFlowSimple
from latte_flow_hf.evaluation.tinyworld_tasks import QUESTIONS, YES_NO, write_tasks
from latte_flow_hf.evaluation.understanding import compare_with_backbone, find_tasks


BATCH = {"batch_size": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tasks, with some that cannot be run, and the stock backbone of the embedded checkpoint."""
    folder = tmp_path_factory.mktemp("lmms_eval")
    write_tasks(folder / "tasks", num_questions=24)
    extract_backbone(tiny_checkpoint()).write(folder / "backbone")
    task = yaml.safe_load((folder / "tasks" / f"{QUESTIONS}.yaml").read_text())
    for name, changes in {
        "no_data": {"dataset_kwargs": {"data_files": {"test": str(folder / "nowhere.parquet")}}},
        "sampled": {"generation_kwargs": {"num_samples": 4}},
        "for_llava": {"generation_kwargs": {**task["generation_kwargs"], "image_aspect_ratio": "pad"}},
    }.items():
        (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump({**task, "task": name, **changes}))
    return folder


@pytest.fixture(scope="module")
def manager(folder):
    return find_tasks([QUESTIONS, YES_NO], folder / "tasks")


@pytest.fixture(autouse=True)
def datasets_cache(folder, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))


def test_lmms_eval_finds_the_model_by_its_name():
    """Through the entry point of the installed package."""
    assert get_model("latte_flow") is LatteFlowChat and get_model("latte_flow", force_simple=True) is LatteFlowSimple


def test_answers_are_those_of_the_pipeline(folder, manager):
    model = LatteFlowChat(str(folder / "backbone"), **BATCH)
    results = simple_evaluate(model=model, tasks=["for_llava"], task_manager=manager, bootstrap_iters=0)
    pipe = LatteFlowPipeline.from_pretrained(tiny_checkpoint())
    documents = model.task_dict["for_llava"]["test"]
    samples = results["samples"]["for_llava"]
    assert len(samples) == 24
    for sample in samples:
        document = documents[sample["doc_id"]]
        answer = pipe.chat(document["question"], images=document["image"], do_sample=False, max_new_tokens=24)
        assert sample["resps"] == [[answer]]
    right = [sample["resps"][0][0] == documents[sample["doc_id"]]["answer"] for sample in samples]
    assert results["results"]["for_llava"]["exact_match,none"] == sum(right) / 24 > 0.9


@pytest.mark.parametrize(("is_simple", "tasks"), [(False, [QUESTIONS]), (True, [QUESTIONS, YES_NO])])
def test_scores_are_those_of_the_stock_backbone(folder, manager, is_simple, tasks, tmp_path):
    found = compare_with_backbone(
        tiny_checkpoint(), folder / "backbone", tasks, manager, tmp_path, is_simple=is_simple, **BATCH
    )
    assert found["tasks"].keys() == set(tasks)
    for result in found["tasks"].values():
        ((score,),) = (result["scores"].values(),)
        assert score["model"] == score["backbone"] > 0.8 and score["difference"] == 0
        assert result["num_answers"] == 24 and result["num_different"] == 0


def test_another_backbone_is_noticed(folder, manager, tmp_path):
    (tmp_path / "other").mkdir()
    for file in (folder / "backbone").iterdir():
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    changed = next(name for name in tensors if name.endswith("mlp.up_proj.weight"))
    save_file({**tensors, changed: -tensors[changed]}, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    found = compare_with_backbone(tiny_checkpoint(), tmp_path / "other", [QUESTIONS], manager, tmp_path, **BATCH)
    result = found["tasks"][QUESTIONS]
    assert result["num_different"] > 5 and result["scores"]["exact_match"]["difference"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": [YES_NO]}, r"cannot run tinyworld_yes_no.*use is_simple=True, or --simple"),
        ({"tasks": ["no_data"]}, "cannot load or score no_data: .*nowhere.parquet"),
        ({"tasks": ["sampled"]}, r"task 'sampled', document 0: the settings \['num_samples'\]"),
        ({"limit": 0}, "limit must be a positive number of questions, got 0"),
        ({"batch_size": "auto"}, "batch_size must be a positive integer, got 'auto'"),
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ({"backbone": tiny_checkpoint()}, "backbone must be its stock backbone, and .* holds a model of type 'latte"),
    ],
)
def test_what_cannot_be_compared(folder, manager, arguments, message, tmp_path):
    call = {"backbone": folder / "backbone", "tasks": [QUESTIONS], **BATCH, **arguments}
    with pytest.raises(ValueError, match=message):
        compare_with_backbone(tiny_checkpoint(), manager=manager, work_dir=tmp_path, **call)


def test_the_model_must_be_one_of_this_package(folder, manager, tmp_path):
    with pytest.raises(ValueError, match=r"pretrained must be a model of this package, and .* of type 'qwen2_vl'"):
        compare_with_backbone(folder / "backbone", folder / "backbone", [QUESTIONS], manager, tmp_path, **BATCH)


def test_tasks_must_exist(folder):
    with pytest.raises(
        ValueError, match=r"there is no task 'tinyworld_question' .*; did you mean tinyworld_questions"
    ):
        find_tasks(["tinyworld_question"], folder / "tasks")
    with pytest.raises(ValueError, match="tasks must name at least one"):
        find_tasks([])
    with pytest.raises(ValueError, match="include_path must be a folder with tasks, and there is none at nowhere"):
        find_tasks([QUESTIONS], "nowhere")


@pytest.fixture(scope="module")
def models():
    made = LatteFlowChat(device="cpu"), LatteFlowSimple(device="cpu")
    for model in made:
        model.task_dict = {"task": {"test": [{"question": "what is this?"}]}}
    return made


def make_request(kind: str, *arguments) -> Instance:
    return Instance(kind, (*arguments, 0, "task", "test"), 0, {"task": "task", "doc_id": 0, "repeats": 1})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"type": "video", "url": "film.mp4"}, "a part of type 'video', and only text and images are supported"),
        ({"type": "audio", "url": "song.mp3"}, "a part of type 'audio', and only text and images are supported"),
        ({"type": "image", "url": "nowhere.png"}, "image 'nowhere.png' cannot be read"),
        ({"type": "text", "text": ""}, "must have text or an image, and all of its text is empty"),
    ],
)
def test_documents_that_cannot_be_asked_about(models, content, message):
    asked = make_request("generate_until", "", lambda _: [{"role": "user", "content": [content]}], {})
    with pytest.raises(ValueError, match=f"task 'task', document 0: .*{message}"):
        models[0].generate_until([asked])


def test_simple_requests_that_cannot_be_answered(models):
    _, simple = models
    with pytest.raises(ValueError, match=r"task 'task', document 0: .*NoneType"):
        simple.generate_until([make_request("generate_until", "what is this?", {}, lambda _: [None])])
    with pytest.raises(ValueError, match=r"task 'task', document 0: .*got ' '"):
        simple.loglikelihood([make_request("loglikelihood", "what is this?", " ", lambda _: [])])
    with pytest.raises(ValueError, match="acc_mutual_info"):
        simple.loglikelihood([make_request("loglikelihood", "yes")])


def test_requests_of_other_kinds_are_refused(models):
    chat, simple = models
    with pytest.raises(NotImplementedError, match="add --force_simple"):
        chat.loglikelihood([])
    with pytest.raises(NotImplementedError, match="tasks of several rounds, such as 'task'"):
        simple.generate_until_multi_round([make_request("generate_until_multi_round", "")])


def test_answers_are_in_the_order_of_the_requests(models):
    """Those of one batch have the same settings, and the longest come first."""
    simple = models[1]
    simple.batch_size = 2
    texts = ["what is this?", "is there a red circle in the picture?", "how many shapes are there?", "what is this?"]
    settings = [{"max_new_tokens": 4}, {"max_new_tokens": 4}, {"max_new_tokens": 1}, {"max_new_tokens": 1}]
    requests = [make_request("generate_until", text, given, lambda _: []) for text, given in zip(texts, settings)]
    together = simple.generate_until(requests)
    assert together == [simple.generate_until([one])[0] for one in requests] and together[0] != together[3]


def test_the_command_prints_both_scores_and_their_difference(folder, tmp_path):
    output = tmp_path / "found.json"
    arguments = ["evaluate", "understanding", "--tasks", QUESTIONS, "--include-path", str(folder / "tasks")]
    arguments += ["--batch-size", "8", "--device", "cpu", "--limit", "8"]
    outcome = CliRunner().invoke(app, [*arguments, "--output", str(output)])
    assert outcome.exit_code == 0, outcome.output
    first, second = outcome.stdout.splitlines()
    assert "difference 0" in first and "0 of 8 answers differ" in second
    result = json.loads(output.read_text())["tasks"][QUESTIONS]
    score = result["scores"]["exact_match"]
    assert f"model {score['model']:.4f}   backbone {score['backbone']:.4f}" in first
    outcome = CliRunner().invoke(app, ["evaluate", "understanding", "--tasks", "mme,mmme"])
    assert outcome.exit_code == 1 and "there is no task 'mmme'" in outcome.stderr


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_command_of_lmms_eval(folder, num_processes, tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"] if num_processes == 2 else []
    arguments = Namespace(
        model="latte_flow", tasks=QUESTIONS, include_path=folder / "tasks", output_path=tmp_path, batch_size=8
    )
    options = [word for name, value in vars(arguments).items() for word in (f"--{name}", str(value))]
    subprocess.run([sys.executable, *launch, "-m", "lmms_eval", *options, "--log_samples"], check=True, timeout=900)
    (results,) = tmp_path.rglob("*_results.json")
    assert json.loads(results.read_text())["results"][QUESTIONS]["exact_match,none"] > 0.8
    (samples,) = tmp_path.rglob("*_samples_*.jsonl")
    assert len(samples.read_text().splitlines()) == 24
