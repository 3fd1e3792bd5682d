# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Saving pipelines together with their code, and uploading them to the hub.

What is unusual here: the code is saved as single files. diffusers downloads one file of a custom component and none of
those that it imports, so each class is saved in one file with all modules of this package that it needs.
"""

import ast
import importlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path
from types import ModuleType

from diffusers import DiffusionPipeline
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelCardData

from .checkpoints import describe, inspect_checkpoint
from .files import atomic_write, check_hash, check_output, read_json, store_hash
from .modeling.configuration_latte_flow import LatteFlowConfig
from .modeling.modeling_latte_flow import LatteFlowForConditionalGeneration
from .modeling.processing_latte_flow import LatteFlowProcessor
from .pipelines.loading import check_pipeline_files
from .pipelines.pipeline_latte_flow import LatteFlowPipeline
from .pipelines.pipeline_latte_flow_img2img import LatteFlowImg2ImgPipeline
from .pipelines.pipeline_latte_flow_inpaint import LatteFlowInpaintPipeline
from .schedulers.scheduling_latte_flow import LatteFlowScheduler


# diffusers always downloads a file of this name.
_PIPELINE_MODULE = "pipeline"
_PIPELINES = {cls.__name__: cls for cls in (LatteFlowPipeline, LatteFlowImg2ImgPipeline, LatteFlowInpaintPipeline)}
_CARD_ARGUMENTS = {
    "LatteFlowPipeline": '"a red circle"',
    "LatteFlowImg2ImgPipeline": '"a red circle", image="image.png"',
    "LatteFlowInpaintPipeline": '"a red circle", image="image.png", mask_image="mask.png"',
}
_COMPONENTS = {
    "model": LatteFlowForConditionalGeneration,
    "processor": LatteFlowProcessor,
    "scheduler": LatteFlowScheduler,
}
_AUTO_CLASSES: dict[str, dict[str, type]] = {
    "model/config.json": {
        "AutoConfig": LatteFlowConfig,
        "AutoModel": LatteFlowForConditionalGeneration,
        "AutoModelForImageTextToText": LatteFlowForConditionalGeneration,
        "AutoModelForMultimodalLM": LatteFlowForConditionalGeneration,
    },
    "processor/processor_config.json": {"AutoProcessor": LatteFlowProcessor},
}

# The folder from which a configuration was loaded: local paths are not published.
_LOCAL_ORIGIN = re.compile(rb'("_name_or_path": )"/[^"]*"')


def join_modules(name: str) -> str:
    """Join a module of this package and the modules of the package that it imports into one source file.

    Args:
        name (`str`): the module's full name.

    Returns:
        `str`: the sources in the order of their imports, without the imports of each other.
    """
    seen: set[str] = set()
    sources: list[str] = []
    definitions: dict[str, object] = {}

    def add(name: str) -> None:
        if name in seen:
            return
        seen.add(name)
        module = importlib.import_module(name)
        assert module.__file__ is not None
        text = Path(module.__file__).read_text(encoding="utf-8")
        lines, tree = text.splitlines(), ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.module is not None and not any(alias.asname for alias in node.names), ast.unparse(node)
                add(resolve_name("." * node.level + node.module, module.__package__))
                for number in range(node.lineno - 1, node.end_lineno or node.lineno):
                    lines[number] = " " * node.col_offset + "pass" if node.col_offset else ""
        for defined, definition in _top_level_names(tree, module):
            # Two modules must not define the same name differently.
            known = definitions.setdefault(defined, definition)
            assert known == definition, f"{defined}: {known} and {definition}"
        sources.append("\n".join([f"# From {name}.", *lines]) + "\n")

    add(name)
    return "\n\n".join(sources)


def _top_level_names(tree: ast.Module, module: ModuleType) -> Iterator[tuple[str, object]]:
    """Names defined at the top level of a module, each with its object or the source of its assignment."""
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                yield ast.unparse(target), ast.unparse(node)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name, getattr(module, node.name)
        elif isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level):
            for alias in node.names:
                name = alias.asname or alias.name.partition(".")[0]
                yield name, getattr(module, name)


def code_files(folder: Path) -> dict[str, str]:
    """The files that a saved pipeline needs to be loaded without this package.

    Args:
        folder (`Path`): a saved pipeline.

    Returns:
        `dict[str, str]`: contents of the files that are new or changed, by path in `folder`: the code, and the
        configurations that refer to it.
    """
    index = read_json(folder / "model_index.json")
    index.pop("_name_or_path", None)  # a local path
    pipeline_class = _PIPELINES[index["_class_name"]]
    files = {f"{_PIPELINE_MODULE}.py": join_modules(pipeline_class.__module__)}
    index["_class_name"] = [_PIPELINE_MODULE, pipeline_class.__name__]
    components = {name: cls for name, cls in _COMPONENTS.items() if index[name][1] == cls.__name__}
    for component, cls in components.items():
        module = cls.__module__.rpartition(".")[2]
        index[component] = [module, cls.__name__]
        # diffusers looks in the component's folder; transformers looks at the root, even with `subfolder=`.
        files[f"{module}.py"] = files[f"{component}/{module}.py"] = join_modules(cls.__module__)
    files["model_index.json"] = json.dumps(index, indent=2) + "\n"
    for path, classes in _AUTO_CLASSES.items():
        component = path.partition("/")[0]
        if component not in components:
            continue
        config, module = read_json(folder / path), index[component][0]
        config["auto_map"] = {auto: f"{module}.{cls.__name__}" for auto, cls in classes.items()}
        files[path] = json.dumps(config, indent=2) + "\n"
    if "model/config.json" in files:
        files["config.json"] = files["model/config.json"]
    return files


def save_with_code(pipe: DiffusionPipeline, folder: str | Path, **kwargs) -> Path:
    """Save a pipeline so that it can be loaded with `trust_remote_code=True` without this package.

    Args:
        pipe ([`LatteFlowPipeline`]): the pipeline.
        folder (`str` or `Path`): the folder to make; it appears whole or not at all.
        kwargs: arguments of `save_pretrained`, such as `variant` or `max_shard_size`.

    Returns:
        `Path`: the folder.

    Raises:
        `ValueError`: if the folder exists.
    """
    folder = Path(folder)
    check_output(folder)
    with atomic_write(folder) as partial:
        pipe.save_pretrained(partial, **kwargs)
        for path, text in code_files(partial).items():
            (partial / path).write_text(text, encoding="utf-8")
    return folder


def publish(folder: str | Path, repo_id: str, private: bool | None = None, with_code: bool = False) -> str:
    """Upload a saved pipeline to the hub in one commit.

    Weights without a stored hash get one, in temporary copies (`latte-flow info --verify` checks it). The same commit
    deletes weights, code and configurations of an earlier upload that the folder does not have: otherwise an old
    `model.safetensors`, for example, would be loaded instead of new shards.

    Args:
        folder (`str` or `Path`): the saved pipeline.
        repo_id (`str`): `user/name`; created if it does not exist.
        private (`bool`, *optional*): whether a new repository is private; the account's default if not given.
        with_code (`bool`, defaults to `False`): whether to add the code, as [`save_with_code`] does.

    Returns:
        `str`: the commit's URL.

    Raises:
        `ValueError`: if the folder is not a complete LaTtE-Flow pipeline, or `private` is set but the repository
            exists and is public.
        `OSError`: if a file is missing or damaged, or the hub refuses. Nothing is uploaded before the folder is
            checked.
    """
    folder = Path(folder)
    check_pipeline_files(folder)
    index = LatteFlowPipeline.load_config(folder)
    if index["_class_name"] not in _PIPELINES:
        raise ValueError(f"{folder} holds a {index['_class_name']}, not one of {list(_PIPELINES)}.")
    missing = [name for name, entry in index.items() if entry == [None, None]]
    if missing:
        raise ValueError(f"{folder} has no {', no '.join(missing)}; save a pipeline with all of its components.")
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    files: dict[str, Path | bytes] = {
        name: path for name, path in paths.items() if not any(part.startswith(".") for part in name.split("/"))
    }
    if with_code:
        files |= {name: text.encode() for name, text in code_files(folder).items()}
    for name, source in files.items():
        if name.endswith(("config.json", "model_index.json")):
            text = source if isinstance(source, bytes) else source.read_bytes()
            files[name] = _LOCAL_ORIGIN.sub(rb'\1""', text)
    with tempfile.TemporaryDirectory() as hashed:
        return _upload(files | _with_hashes(files, Path(hashed)), folder, repo_id, private, with_code)


def _with_hashes(files: dict[str, Path | bytes], folder: Path) -> dict[str, Path | bytes]:
    """Copies in `folder` of those weights that have no stored hash, with one, by their path in the repository.

    Raises:
        `OSError`: if weights do not have the stored hash.
    """
    copies: dict[str, Path | bytes] = {}
    for name, path in files.items():
        if isinstance(path, Path) and path.suffix == ".safetensors" and not check_hash(path):
            copy = folder / str(len(copies))
            shutil.copyfile(path, copy)
            store_hash(copy)
            copies[name] = copy
    return copies


def _upload(files: dict[str, Path | bytes], folder: Path, repo_id: str, private: bool | None, with_code: bool) -> str:
    hub = HfApi()
    repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not hub.model_info(repo_id).private:
        raise ValueError(f"repository {repo_id} is public; choose another name, or make it private on the hub.")
    uploaded = hub.list_repo_files(repo_id)
    if "README.md" not in {*files, *uploaded}:
        files["README.md"] = str(model_card(folder, repo_id, with_code)).encode()
    operations: list = [CommitOperationAdd(name, source) for name, source in sorted(files.items())]
    components = {path.name for path in folder.iterdir() if path.is_dir()}
    operations += [
        CommitOperationDelete(name)
        for name in uploaded
        if name not in files and (name.partition("/")[0] in components or ("/" not in name and name.endswith(".py")))
    ]
    return hub.create_commit(repo_id, operations, commit_message="Upload a LaTtE-Flow pipeline").commit_url


def model_card(folder: Path, repo_id: str, with_code: bool) -> ModelCard:
    """The model card of a published pipeline that has none: what it is and how to load it."""
    data = ModelCardData(library_name="diffusers", pipeline_tag="text-to-image", tags=["latte-flow", "any-to-any"])
    name = read_json(folder / "model_index.json")["_class_name"]
    load = (
        f'from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained("{repo_id}", '
        "trust_remote_code=True)"
        if with_code
        else f'from latte_flow_hf import {name}\n\npipe = {name}.from_pretrained("{repo_id}")'
    )
    facts = "\n".join(describe(inspect_checkpoint(str(folder)))[1:])  # the first line holds the local path
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {repo_id.rpartition('/')[2]}\n\n"
        "A [LaTtE-Flow](https://arxiv.org/abs/2506.06952) model: a frozen vision-language model that answers, with "
        "layerwise timestep experts that generate images.\n\n"
        f"```python\n{load}\nimage = pipe({_CARD_ARGUMENTS[name]}).images[0]\n"
        'answer = pipe.chat("what is it?", images=image)\n'
        f"```\n\n```text\n{facts}\n```\n"
    )
