# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Tasks for lmms-eval with questions about the tiny world, which the embedded checkpoint can answer."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..files import atomic_write, check_output
from . import tinyworld


# Both are kinds of the same questions: to be answered in words, and to be chosen from two answers.
QUESTIONS, YES_NO = "tinyworld_questions", "tinyworld_yes_no"
_SHARED = {"dataset_path": "parquet", "test_split": "test", "doc_to_visual": "image", "doc_to_text": "question"}
_TASKS: dict[str, dict[str, Any]] = {
    QUESTIONS: {
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"max_new_tokens": 24, "do_sample": False, "until": []},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    YES_NO: {
        "output_type": "multiple_choice",
        "doc_to_target": "answer",
        "doc_to_choice": ["yes", "no"],
        # The first word of the answer in a chat template has no space before it.
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
}


def write_tasks(folder: str | Path, seed: int = 1, num_questions: int = 200) -> None:
    """Write the tasks `tinyworld_questions` and `tinyworld_yes_no` into a folder for lmms-eval's `--include_path`.

    Args:
        folder (`str` or `Path`): the folder to make.
        seed (`int`, defaults to 1): of the images, the questions and their choice. They are those of `latte-flow
            evaluate`: scenes that are not in the training data, and held-out digits.
        num_questions (`int`, defaults to 200): the number of questions of each task, at most 800.

    Raises:
        `ValueError`: if `folder` exists, or there are fewer questions than `num_questions`.
        `ImportError`: if datasets is not installed.
    """
    import datasets

    check_output(folder)
    found = tinyworld.understanding_questions(seed)
    rows = [
        {"image": image, "question": item.question, "answer": item.answer, "kind": item.kind}
        for questions in found.values()
        for image, item in questions
    ]
    rng = np.random.default_rng(seed)
    rows = [rows[index] for index in rng.permutation(len(rows))]
    rows_of = {QUESTIONS: rows, YES_NO: [row for row in rows if row["answer"] in ("yes", "no")]}
    most = min(map(len, rows_of.values()))
    if not 1 <= num_questions <= most:
        raise ValueError(f"num_questions must be from 1 to {most}, got {num_questions}.")
    features = datasets.Features(
        {"image": datasets.Image(), **{name: datasets.Value("string") for name in ("question", "answer", "kind")}}
    )
    with atomic_write(folder) as partial:
        partial.mkdir()
        for task, settings in _TASKS.items():
            data = f"{task}.parquet"
            datasets.Dataset.from_list(rows_of[task][:num_questions], features).to_parquet(partial / data)
            # lmms-eval looks for the data beside the task.
            content = {"task": task, **_SHARED, "dataset_kwargs": {"data_files": {"test": data}}, **settings}
            (partial / f"{task}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
