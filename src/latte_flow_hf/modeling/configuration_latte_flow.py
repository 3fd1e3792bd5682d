# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The configuration: that of the backbone, and what the generation tower adds."""

import itertools
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .backbone import check_vlm_config
from .flow_matching import TIMESTEP_SAMPLINGS, check_boundaries, uniform_boundaries
from .sampling import check_sampling


RESIDUAL_ATTENTION_MODES = ("scores", "probabilities", None)


class LatteFlowConfig(PreTrainedConfig):
    """Configuration of [`LatteFlowForConditionalGeneration`].

    Args:
        vlm_config (`PreTrainedConfig` or `dict`, *optional*):
            The backbone's configuration; Qwen2-VL with its defaults if not given.
        num_experts (`int`, defaults to 4):
            K, the number of contiguous layer groups. Must divide the number of the tower's layers, unless
            `layers_per_expert` is given. (Paper: the main setting, 28 layers in 4 groups of 7; 1 is its "vanilla"
            network.)
        layers_per_expert (`list[int]`, *optional*):
            The number of layers of each expert, expert 0 first, in all those of the tower; the same for all if not
            given. (Paper: the same for all.)
        tower_layers (`list[int]`, *optional*):
            The backbone's decoder layers that the tower has a replica of, by rising index; all of them if not given
            (paper). Each replica attends to the prompt's keys and values of its own layer of the backbone.
        expert_boundaries (`list[float]`, *optional*):
            K + 1 falling sigmas from 1 (noise) to 0 (data); expert k owns boundaries[k] >= sigma > boundaries[k + 1].
            Uniform if not given (chosen: the sources are silent).
        latent_channels (`int`, defaults to 32):
            Channels of the autoencoder's latents (DC-AE f32c32).
        latent_patch_size (`int`, defaults to 1):
            Side of the square of latent pixels that one token holds.
        latent_kernel_size (`int`, *optional*):
            Side of the square of latent pixels that a token is embedded from, centred on its own patch;
            `latent_patch_size` if not given. A larger square overlaps those of its neighbours. (Chosen: experts of few
            layers learned faster with it; the embedded checkpoint uses it.)
        sample_size (`int`, defaults to 8):
            Default side of the latents in the pipeline, in latent pixels: the size that the experts were trained on.
            (Paper: 256x256 pixels and DC-AE f32, hence 8.)
        residual_attention (`str` or `None`, defaults to `"scores"`):
            Which attention map a layer adds to that of the next layer of its group: the scores before the softmax
            (`"scores"`; chosen: rows stay normalised), the probabilities after it (`"probabilities"`), or none
            (`None`).
        timestep_frequency_dim (`int`, defaults to 256):
            Size of the sinusoidal embedding of the timestep.
        timestep_embed_dim (`int`, *optional*):
            Size of the timestep embedding that modulates the layers; the backbone's width if not given.
        timestep_sampling (`str`, defaults to `"uniform"`):
            How training draws timesteps in the interval of each expert: `"uniform"` or `"logit_normal"`. (Chosen: the
            sources are silent.) A field of the configuration, because `forward` draws them.
        sampling (`dict`, *optional*):
            Steps and guidance that the pipeline uses if a call gives none, see [`modeling.sampling.check_sampling`].
            Distillation sets them.
        trained_words (`list[str]`, *optional*):
            For a model of a small world: the words of all texts that it was trained on, in lower case. Other words,
            and other sizes than `sample_size`, are warned of. (Chosen for the embedded checkpoint, whose images of
            anything else are blobs.)

    Raises:
        `ValueError`: if the backbone is no vision-language model of transformers with a decoder, `num_experts` does
            not divide the tower's layers, or another value is out of range.
    """

    model_type = "latte_flow"
    sub_configs_defaults = {"vlm_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2_vl")}

    # Where the default is `None`, `__post_init__` sets the value.
    vlm_config: PreTrainedConfig = None  # type: ignore[assignment]
    num_experts: int = 4
    layers_per_expert: list[int] = None  # type: ignore[assignment]
    tower_layers: list[int] = None  # type: ignore[assignment]
    expert_boundaries: list[float] = None  # type: ignore[assignment]
    latent_channels: int = 32
    latent_patch_size: int = 1
    latent_kernel_size: int = None  # type: ignore[assignment]
    sample_size: int = 8
    residual_attention: str | None = "scores"
    timestep_frequency_dim: int = 256
    timestep_embed_dim: int = None  # type: ignore[assignment]
    timestep_sampling: str = "uniform"
    sampling: dict[str, Any] | None = None
    trained_words: list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_vlm_config(self.vlm_config)
        if self.text_config.hidden_size % 4:
            raise ValueError(
                f"vlm_config must have a hidden_size that is a multiple of 4, for the sines and cosines of rows and "
                f"columns, got {self.text_config.hidden_size}; use another backbone."
            )
        if self.timestep_embed_dim is None:
            self.timestep_embed_dim = self.text_config.hidden_size
        if self.latent_kernel_size is None:
            self.latent_kernel_size = self.latent_patch_size
        counts = (
            "num_experts",
            "latent_channels",
            "latent_patch_size",
            "latent_kernel_size",
            "sample_size",
            "timestep_frequency_dim",
            "timestep_embed_dim",
        )
        for name in counts:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)!r}.")
        if self.sample_size % self.latent_patch_size:
            raise ValueError(
                f"sample_size must be a multiple of latent_patch_size = {self.latent_patch_size}, "
                f"got {self.sample_size}."
            )
        overlap = self.latent_kernel_size - self.latent_patch_size
        if overlap < 0 or overlap % 2:
            raise ValueError(
                f"latent_kernel_size must be latent_patch_size = {self.latent_patch_size} plus an even number, got "
                f"{self.latent_kernel_size}."
            )
        self._check_layers()
        if self.residual_attention not in RESIDUAL_ATTENTION_MODES:
            raise ValueError(
                f"residual_attention must be one of {list(RESIDUAL_ATTENTION_MODES)}, got {self.residual_attention!r}."
            )
        if self.timestep_sampling not in TIMESTEP_SAMPLINGS:
            raise ValueError(
                f"timestep_sampling must be one of {list(TIMESTEP_SAMPLINGS)}, got {self.timestep_sampling!r}."
            )
        if self.expert_boundaries is None:
            self.expert_boundaries = uniform_boundaries(self.num_experts)
        self.expert_boundaries = check_boundaries(self.expert_boundaries, self.num_experts)
        if self.sampling is not None:
            self.sampling = check_sampling(self.sampling, self.num_experts)

    def _check_layers(self) -> None:
        """Check `tower_layers` and `layers_per_expert`, and fill in what is not given."""
        num_backbone_layers = self.text_config.num_hidden_layers
        if self.tower_layers is None:
            self.tower_layers = list(range(num_backbone_layers))
        is_rising = all(first < second for first, second in itertools.pairwise(self.tower_layers))
        if not self.tower_layers or not is_rising or not set(self.tower_layers) <= set(range(num_backbone_layers)):
            raise ValueError(
                f"tower_layers must be rising indices of the backbone's {num_backbone_layers} layers, from 0 to "
                f"{num_backbone_layers - 1}, got {self.tower_layers}."
            )
        num_layers = len(self.tower_layers)
        if self.layers_per_expert is None:
            if num_layers % self.num_experts:
                divisors = [k for k in range(1, num_layers + 1) if num_layers % k == 0]
                whose = "backbone" if num_layers == num_backbone_layers else "tower"
                raise ValueError(
                    f"num_experts must divide the {whose}'s {num_layers} layers, got {self.num_experts}; "
                    f"use one of {divisors} instead, or give layers_per_expert, the number of layers of each expert."
                )
            self.layers_per_expert = [num_layers // self.num_experts] * self.num_experts
        counts = self.layers_per_expert
        if len(counts) != self.num_experts or min(counts) < 1 or sum(counts) != num_layers:
            raise ValueError(
                f"layers_per_expert must be num_experts = {self.num_experts} positive numbers with the sum "
                f"{num_layers}, the number of the tower's layers, got {counts}."
            )

    def expert_layers(self, expert: int) -> range:
        """The indices of the layers of expert `expert` among those of the tower."""
        counts = self.layers_per_expert
        first = sum(counts[:expert])
        return range(first, first + counts[expert])

    def context_layers(self, expert: int) -> list[int]:
        """The indices of the decoder layers whose keys and values expert `expert` reads."""
        return [self.tower_layers[index] for index in self.expert_layers(expert)]

    def describe_layers(self) -> str:
        """How many layers each expert has, in words: `7 layers`, or `8, 7, 7, 6 layers`."""
        counts = self.layers_per_expert
        return f"{counts[0] if len(set(counts)) == 1 else ', '.join(map(str, counts))} layers"

    def expert_of_layer(self, index: int) -> int:
        """The expert that layer number `index` of the tower belongs to."""
        return next(k for k in range(self.num_experts) if index in self.expert_layers(k))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "LatteFlowConfig":
        """Same as `PreTrainedConfig.from_dict`, but for this model type alone.

        From the configuration of another model, or without a backbone, `PreTrainedConfig` would build the defaults, a
        72B backbone.

        Raises:
            `ValueError`: if `config_dict` belongs to another model type or has no `vlm_config`.
        """
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"model_type must be {cls.model_type!r}, got {model_type!r}; use "
                "LatteFlowForConditionalGeneration.from_vlm to build a LaTtE-Flow model from a backbone."
            )
        if "vlm_config" not in config_dict and "vlm_config" not in kwargs:
            raise ValueError(
                "config.json has no vlm_config, the configuration of the backbone; save or download it again."
            )
        return super().from_dict(config_dict, **kwargs)

    @property
    def text_config(self) -> PreTrainedConfig:
        """The backbone's text configuration; transformers expects this name."""
        return self.vlm_config.get_text_config(decoder=True)

    @property
    def vision_config(self) -> PreTrainedConfig:
        """The backbone's vision configuration; transformers expects this name."""
        return self.vlm_config.vision_config

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        return self.vlm_config.get_text_config(decoder=decoder, encoder=encoder)

    @property
    def has_mrope(self) -> bool:
        """Whether the backbone's positions have three axes, as in Qwen2-VL."""
        return "mrope_section" in (getattr(self.text_config, "rope_parameters", None) or {})
