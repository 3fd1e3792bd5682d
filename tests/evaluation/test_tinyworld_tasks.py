"""The tasks that are written for lmms-eval have the questions of the evaluation, chosen by a seed."""

import numpy as np
import pytest
import yaml
from datasets import load_dataset

from latte_flow_hf.evaluation import tinyworld
from latte_flow_hf.evaluation.tinyworld_tasks import write_tasks


@pytest.fixture
def few_questions(monkeypatch):
    """Of two scenes and four digits: all of them take seconds to draw."""
    questions = tinyworld.understanding_questions
    indices = tinyworld.digit_indices
    monkeypatch.setattr(tinyworld, "digit_indices", lambda held_out: indices(held_out)[:4])
    monkeypatch.setattr(tinyworld, "understanding_questions", lambda seed: questions(seed, 2))


def read(folder, task):
    file = str(folder / f"{task}.parquet")
    return load_dataset("parquet", data_files=file, split="train", cache_dir=str(folder / "cache"))


def test_questions_are_those_of_the_evaluation(few_questions, tmp_path):
    write_tasks(tmp_path / "tasks", seed=3, num_questions=5)
    asked = {
        (item.question, item.answer, np.asarray(image).tobytes())
        for questions in tinyworld.understanding_questions(3).values()
        for image, item in questions
    }
    rows = read(tmp_path / "tasks", "tinyworld_questions")
    assert len(rows) == 5
    assert {(row["question"], row["answer"], np.asarray(row["image"]).tobytes()) for row in rows} <= asked
    choices = read(tmp_path / "tasks", "tinyworld_yes_no")
    assert len(choices) == 5 and set(choices["answer"]) <= {"yes", "no"}
    for name in ("tinyworld_questions", "tinyworld_yes_no"):
        task = yaml.safe_load((tmp_path / "tasks" / f"{name}.yaml").read_text())
        assert task["task"] == name
        assert (tmp_path / "tasks" / task["dataset_kwargs"]["data_files"]["test"]).is_file()


def test_questions_depend_on_the_seed_alone(few_questions, tmp_path):
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        write_tasks(tmp_path / name, seed, num_questions=5)
    one, same, other = (
        read(tmp_path / name, "tinyworld_questions")["question"][:] for name in ("one", "same", "other")
    )
    assert one == same != other


def test_what_cannot_be_written(few_questions, tmp_path):
    with pytest.raises(ValueError, match=r"num_questions must be from 1 to \d+, got 1000"):
        write_tasks(tmp_path / "tasks", num_questions=1000)
    with pytest.raises(ValueError, match=r"num_questions must be from 1 to \d+, got 0"):
        write_tasks(tmp_path / "tasks", num_questions=0)
    assert not (tmp_path / "tasks").exists()
    with pytest.raises(ValueError, match="exists; choose another name"):
        write_tasks(tmp_path)
