# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Tasks of lmms-eval on a model and on its stock backbone: two runs of the same questions, and what differs.

lmms-eval is imported where it is needed: what it found can be compared without it.
"""

import argparse
import difflib
import gc
from collections.abc import Sequence
from importlib import metadata
from numbers import Real
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..files import component_subfolder
from ..modeling.configuration_latte_flow import LatteFlowConfig


def find_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> Any:
    """The `TaskManager` of lmms-eval, with all tasks of lmms-eval and those in a folder.

    Args:
        tasks (`Sequence[str]`): names of tasks that must be among them.
        include_path (`str` or `Path`, *optional*): the folder.

    Raises:
        `ValueError`: if there is no task of a name, `tasks` is empty, or `include_path` is no folder.
    """
    from lmms_eval.tasks import TaskManager

    from .lmms_eval import MODEL_NAME

    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path must be a folder with tasks, and there is none at {include_path}.")
    if not tasks:
        raise ValueError("tasks must name at least one task of lmms-eval, such as mmbench_en_dev.")
    manager = TaskManager(include_path=None if include_path is None else str(include_path), model_name=MODEL_NAME)
    for task in tasks:
        if task not in manager.all_tasks:
            similar = difflib.get_close_matches(task, manager.all_tasks)
            hint = f"did you mean {' or '.join(similar)}?" if similar else "`lmms-eval tasks list` shows all of them."
            raise ValueError(f"there is no task {task!r} in lmms-eval or the folder of tasks; {hint}")
    return manager


def compare_with_backbone(
    pretrained: str | Path,
    backbone: str | Path,
    tasks: Sequence[str],
    manager: Any,
    work_dir: str | Path,
    limit: int | None = None,
    is_simple: bool = False,
    **model_args: Any,
) -> dict[str, Any]:
    """Run tasks of lmms-eval on a model and on a stock backbone, each in a run of its own.

    Args:
        pretrained (`str` or `Path`): folder or hub id of the model, see [`Answerer`].
        backbone (`str` or `Path`): folder or hub id of its stock backbone, such as `latte-flow convert
            extract-backbone` writes.
        tasks (`Sequence[str]`): names of tasks.
        manager (`TaskManager`): as returned by `find_tasks`.
        work_dir (`str` or `Path`): folder for the files of tasks that write some.
        limit (`int`, *optional*): the number of questions of each task; all if left out.
        is_simple (`bool`, defaults to `False`): whether to run them as tasks of simple models. Those with answers to
            choose from need it.
        model_args: further arguments of [`LatteFlowChat`], such as `batch_size` and `device`.

    Returns:
        `dict`: `lmms_eval`, its version, and `tasks`, see `compare`.

    Raises:
        `ValueError`: if a task cannot be loaded or run, or has no questions; `limit` is not positive; `pretrained` is
            a stock model; or `backbone` is none.
    """
    from .lmms_eval import LatteFlowChat, LatteFlowSimple

    if limit is not None and limit < 1:
        raise ValueError(f"limit must be a positive number of questions, got {limit}.")
    for name, source, is_ours in (("pretrained", pretrained, True), ("backbone", backbone, False)):
        config = AutoConfig.from_pretrained(source, subfolder=component_subfolder(source, "model"))
        if isinstance(config, LatteFlowConfig) != is_ours:
            kind = "a model of this package" if is_ours else "its stock backbone"
            raise ValueError(f"{name} must be {kind}, and {source} holds a model of type {config.model_type!r}.")
    model_class = LatteFlowSimple if is_simple else LatteFlowChat
    runs = []
    for source in (pretrained, backbone):
        runs.append(_run(model_class(str(source), **model_args), tasks, manager, work_dir, limit))
        gc.collect()  # The first model makes room for the second.
    return {"lmms_eval": metadata.version("lmms_eval"), "tasks": compare(*runs)}


def _run(model: Any, tasks: Sequence[str], manager: Any, work_dir: str | Path, limit: int | None) -> dict[str, Any]:
    from lmms_eval.evaluator import simple_evaluate
    from tenacity import RetryError

    try:
        results = simple_evaluate(
            model=model,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            # What tasks read of the command line of lmms-eval.
            cli_args=argparse.Namespace(output_path=str(work_dir), process_with_media=True),
        )
    except AssertionError as error:
        raise ValueError(
            f"lmms-eval cannot run {', '.join(tasks)}: {error}. Tasks with answers to choose from are tasks of simple "
            "models: use is_simple=True, or --simple."
        ) from error
    except NotImplementedError as error:
        raise ValueError(str(error)) from error
    except RetryError as error:
        cause = error.last_attempt.exception()
        raise ValueError(f"lmms-eval cannot load or score {', '.join(tasks)}: {cause}") from cause
    if not all(results["samples"].values()):
        raise ValueError(f"lmms-eval found no questions in one of {', '.join(tasks)}.")
    return results


def compare(model: dict[str, Any], backbone: dict[str, Any]) -> dict[str, Any]:
    """What differs between two results of lmms-eval's `simple_evaluate` for the same tasks.

    Returns:
        `dict`: by task, `scores`, a dict of `model`, `backbone` and `difference` (model - backbone) for each metric
        that is a number; `num_answers`; `num_different`, how many of them the two answer differently; and `different`,
        these answers with the number of their document. The answer of a simple model to a question with answers to
        choose from is its loss for each of them.

    Raises:
        `ValueError`: if the results have different questions.
    """
    compared: dict[str, Any] = {}
    for task, metrics in model["higher_is_better"].items():
        scores = {}
        for key, score in model["results"][task].items():
            other = backbone["results"][task].get(key)
            # Such as "exact_match,none": the metric, and the filter that the answers went through.
            if key.partition(",")[0] in metrics and isinstance(score, Real) and isinstance(other, Real):
                difference = float(score) - float(other)
                values = {"model": float(score), "backbone": float(other), "difference": difference}
                scores[key.removesuffix(",none")] = values
        ours, stock = _answers(model, task), _answers(backbone, task)
        if [document for document, _ in ours] != [document for document, _ in stock]:
            raise ValueError(f"the two results of {task} are for different questions.")
        different = [
            {"document": document, "model": answer, "backbone": other}
            for (document, answer), (_, other) in zip(ours, stock)
            if answer != other
        ]
        compared[task] = {
            "scores": scores,
            "num_answers": len(ours),
            "num_different": len(different),
            "different": different,
        }
    return compared


def _answers(results: dict[str, Any], task: str) -> list[tuple[int, Any]]:
    """Documents and their answers. Groups of tasks have none of their own."""
    samples = results["samples"].get(task, [])
    return sorted(((sample["doc_id"], sample["resps"]) for sample in samples), key=lambda pair: pair[0])


def describe(compared: dict[str, Any]) -> list[str]:
    """What `compare` returned, as the lines that `latte-flow evaluate understanding` prints."""
    lines = []
    for task, result in compared.items():
        for metric, score in result["scores"].items():
            lines.append(
                f"{task:24}{metric:20}model {score['model']:.4f}   backbone {score['backbone']:.4f}   "
                f"difference {score['difference']:.4g}"
            )
        if result["num_answers"]:
            lines.append(f"{task:24}{result['num_different']} of {result['num_answers']} answers differ")
    return lines
