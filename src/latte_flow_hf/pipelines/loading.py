# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Where loading a pipeline differs from `DiffusionPipeline`: local folders are checked, and code in a checkpoint is
not run if this package is installed."""

import contextlib
import re
from collections.abc import Container
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from safetensors import safe_open
from transformers import GenerationConfig

from ..files import check_files, read_json


# The files of each component. Weights may be sharded, or of a variant such as fp16.
_COMPONENT_FILES = {
    "model": ("config.json", "model.safetensors|model.*.safetensors|model.safetensors.index*.json"),
    "processor": (
        "processor_config.json|preprocessor_config.json",
        "tokenizer.json|vocab.json",
        "tokenizer_config.json",
    ),
    "scheduler": ("scheduler_config.json",),
    "vae": ("config.json", "diffusion_pytorch_model.safetensors|diffusion_pytorch_model*"),
}


class LatteFlowLoadingMixin(ConfigMixin):
    """Loading and saving for the pipeline; it stands before `DiffusionPipeline`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Same as `DiffusionPipeline.from_pretrained`, but a local folder is checked before anything is loaded.

        Raises:
            `OSError`: with the path of the file that is missing, truncated or damaged.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            check_pipeline_files(folder, given=kwargs)
        return super().from_pretrained(str(pretrained_model_name_or_path), **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Same as `DiffusionPipeline.save_pretrained`, and transformers can load the model from the folder itself."""
        super().save_pretrained(save_directory, *args, **kwargs)
        write_root_config(Path(save_directory))

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """A pipeline of this class with the components of another one, which are shared, not copied. Same as
        `DiffusionPipeline.from_pipe`, with two differences: an autoencoder of any class is kept, and the components
        keep their dtype unless one is given. (diffusers would convert the shared components to float32.)

        Args:
            pipeline (`DiffusionPipeline`): the other pipeline.
            kwargs: components that replace those of `pipeline`, or arguments of `DiffusionPipeline.from_pipe`.
        """
        components = {**pipeline.components, **kwargs}
        is_ours = components.keys() == set(cls._get_signature_keys(cls)[0])  # type: ignore[attr-defined]
        if not is_ours:
            return super().from_pipe(pipeline, **{"vae": components.get("vae"), **kwargs})
        pipe = cls(**components)
        pipe.register_to_config(_name_or_path=pipeline.config.get("_name_or_path"))
        return pipe

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Same as `DiffusionPipeline.download`, and fetches the model's generation_config.json, which diffusers does
        not; the autoencoder is checked.

        Raises:
            `OSError`: if the autoencoder lacks tensors.
        """
        folder = Path(super().download(pretrained_model_name, **kwargs))
        with contextlib.suppress(OSError):  # The file is optional.
            GenerationConfig.from_pretrained(
                pretrained_model_name,
                subfolder="model",
                revision=folder.name,  # the commit
                **{name: kwargs[name] for name in ("cache_dir", "token", "local_files_only") if kwargs.get(name)},
            )
        if (folder / "vae" / "config.json").exists():
            check_autoencoder(folder / "vae")
        return str(folder)

    @classmethod
    def _dict_from_json_file(cls, json_file: Any) -> dict:
        """Same as `ConfigMixin._dict_from_json_file`, but classes that a checkpoint brings as code are replaced by the
        classes of this package, if it is installed: the code in the checkpoint does not run."""
        config = super()._dict_from_json_file(json_file)
        if "latte_flow_hf" in LOADABLE_CLASSES and isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][1]
            for name, entry in config.items():
                if name in _COMPONENT_FILES and str(entry[1]).startswith("LatteFlow"):
                    config[name] = ["latte_flow_hf", entry[1]]
        return config


def write_root_config(folder: Path) -> None:
    """Copy the configuration of the model to the folder of the pipeline, where the Auto classes of transformers look
    for it."""
    config = folder / "model" / "config.json"
    if config.is_file():
        (folder / "config.json").write_bytes(config.read_bytes())


def check_pipeline_files(folder: Path, given: Container[str] = ()) -> None:
    """Check that a local pipeline is complete.

    Args:
        folder (`Path`): the folder of the pipeline.
        given (container of `str`): names of components that are not loaded from the folder.

    Raises:
        `OSError`: with the path of the file that is missing, truncated or damaged.
    """
    check_files(folder, "model_index.json")
    index = read_json(folder / "model_index.json")
    for name in ("_class_name", *_COMPONENT_FILES):
        if name not in index and name not in given:
            raise OSError(f"{folder / 'model_index.json'} has no {name}; save or download it again.")
    for component, names in _COMPONENT_FILES.items():
        if component not in given and index.get(component) != [None, None]:
            check_files(folder / component, *names)
            # transformers ignores some of these, or does not name the file, if it cannot read them.
            for path in sorted((folder / component).glob("*.json")):
                read_json(path)
            if component == "vae":
                check_autoencoder(folder / component)


def check_autoencoder_of(vae: torch.nn.Module) -> None:
    """Same as `check_autoencoder`, for an autoencoder that is loaded, if its folder is still there.

    A pipeline checks its own: `DiffusionPipeline.from_pretrained` loads the components before our classes are asked.
    """
    folder = Path(str(getattr(vae, "config", {}).get("_name_or_path") or ""))
    if (folder / "config.json").is_file():
        check_autoencoder(folder)


def check_autoencoder(folder: Path) -> None:
    """Check that a folder has all tensors of its autoencoder: diffusers leaves those that are missing uninitialised.

    Only safetensors are checked, and only autoencoders of diffusers.

    Args:
        folder (`Path`): the folder of the autoencoder.

    Raises:
        `OSError`: naming the tensors that are missing.
    """
    config = read_json(folder / "config.json")
    autoencoder_class = getattr(diffusers, str(config.get("_class_name")), None)
    # Each variant, such as fp16, has files of its own.
    stored: dict[str, set[str]] = {}
    for weights in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
        variant = re.sub(r"-\d{5}-of-\d{5}", "", weights.name)
        with safe_open(weights, framework="pt") as file:
            stored.setdefault(variant, set()).update(file.keys())
    if autoencoder_class is None or not stored:
        return
    with torch.device("meta"):
        autoencoder = autoencoder_class.from_config(config)
    for variant, names in stored.items():
        # What diffusers does to the names in old checkpoints when it loads them.
        renamed = dict.fromkeys(names)
        autoencoder._fix_state_dict_keys_on_load(renamed)
        missing = sorted(autoencoder.state_dict().keys() - renamed.keys())
        if missing:
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            raise OSError(
                f"{folder / variant} lacks tensors of {autoencoder_class.__name__}: {', '.join(missing[:8])}{more}; "
                "save or download it again."
            )
