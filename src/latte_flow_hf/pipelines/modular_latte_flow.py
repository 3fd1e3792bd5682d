# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The pipeline as blocks of diffusers' modular pipelines, with diffusers' guiders in place of `guidance_scale`.

Each block calls the methods of a [`LatteFlowPipeline`] around the same components, so that both give the same images.
A call has its own copies of the scheduler and of the guider: both keep the state of a call in themselves.
"""

import copy
import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, ModularPipeline, ModularPipelineBlocks, SequentialPipelineBlocks
from diffusers.configuration_utils import FrozenDict
from diffusers.guiders import AutoGuidance, ClassifierFreeGuidance, SkipLayerGuidance
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.hooks import LayerSkipConfig
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.modular_pipelines import (
    ComponentSpec,
    InputParam,
    LoopSequentialPipelineBlocks,
    OutputParam,
    PipelineState,
)

from ..modeling.context import LatteFlowContext
from ..modeling.modeling_latte_flow import LatteFlowForConditionalGeneration, LatteFlowLayer
from ..modeling.processing_latte_flow import LatteFlowProcessor
from ..modeling.sampling import DEFAULT_GUIDANCE_SCALE, check_distilled_steps, experts_with_guidance
from ..schedulers.scheduling_latte_flow import LatteFlowScheduler
from ..schedulers.steps import (
    distilled_scheduler,
    experts_of_steps,
    finish_step,
    generator_kwargs,
    model_timesteps,
    set_timesteps,
)
from .calls import one_thread_at_a_time
from .loading import check_autoencoder
from .lora import LatteFlowLoraMixin
from .offloading import check_hooks, has_forward_hooks, runs_only_in_forward
from .pipeline_latte_flow import LatteFlowPipeline


MODEL_NAME = "latte-flow"

# What the denoiser takes of each condition of a guider: its name, and the conditional and unconditional input.
GUIDER_INPUTS = {"context": ("context", "negative_context")}


class _SkippableLayer(LatteFlowLayer):
    """A layer that diffusers' layer-skip hooks know. `LatteFlowLayer` itself stays unknown to them: caches, which use
    the same table, would skip layers of a model in the middle of a trajectory."""


class _LayerMetadata(TransformerBlockMetadata):
    """What those hooks return in place of a skipped layer: its hidden states and, as a layer returns them too, the
    attention scores of the layer before it."""

    def _get_parameter_from_args_kwargs(self, identifier: str, args: Any = (), kwargs: Any = None) -> Any:
        name = "previous_scores" if identifier == "encoder_hidden_states" else identifier
        return super()._get_parameter_from_args_kwargs(name, args, kwargs)


TransformerBlockRegistry.register(
    _SkippableLayer, _LayerMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=1)
)


def _components(*names: str) -> list[ComponentSpec]:
    types = {
        "model": LatteFlowForConditionalGeneration,
        "processor": LatteFlowProcessor,
        "vae": AutoencoderDC,
        "scheduler": LatteFlowScheduler,
    }
    guider = ComponentSpec(
        "guider",
        ClassifierFreeGuidance,
        config=FrozenDict({"guidance_scale": DEFAULT_GUIDANCE_SCALE}),
        default_creation_method="from_config",
    )
    return [guider if name == "guider" else ComponentSpec(name, types[name]) for name in names]


_CALL = inspect.signature(LatteFlowPipeline.__call__).parameters


def _inputs(*names: str, required: tuple[str, ...] = ()) -> list[InputParam]:
    """Arguments of [`LatteFlowPipeline`], with its defaults, and values of earlier blocks, which are `required`."""
    documented = "Same as in `LatteFlowPipeline`."
    return [
        *(InputParam(name, default=_CALL[name].default, description=documented) for name in names),
        *(InputParam(name, required=True, description="From an earlier block.") for name in required),
    ]


def _pipeline(components: Any, *required: str) -> LatteFlowPipeline:
    """A [`LatteFlowPipeline`] around the components of a modular pipeline.

    Raises:
        `ValueError`: if a component in `required` is missing, or components do not belong together.
    """
    found: dict[str, Any] = {
        name: getattr(components, name, None) for name in ("model", "processor", "vae", "scheduler")
    }
    missing = [name for name in required if getattr(components, name, None) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)}: not loaded yet; call load_components() or update_components(...).")
    return LatteFlowPipeline(**found)


def _has_hooks(guider: BaseGuidance) -> bool:
    """Whether a guider changes the model for one of its conditions."""
    return type(guider).prepare_models is not BaseGuidance.prepare_models


def call_guider(guider: BaseGuidance) -> BaseGuidance:
    """A copy of a guider for one call, at its start: `num_conditions` is then the largest of the call.

    Raises:
        `ValueError`: if the guider needs what this model cannot give.
    """
    name = type(guider).__name__
    if not isinstance(guider, BaseGuidance):
        raise ValueError(f"guider must be a guider of diffusers, got {name}; use guider.disable() for none.")
    others = set(guider._input_predictions) - {"pred_cond", "pred_uncond"}
    if not isinstance(guider, (AutoGuidance, SkipLayerGuidance)) and (_has_hooks(guider) or others):
        raise ValueError(
            f"guider {name} needs other predictions ({sorted(others)}) or hooks that only diffusers' own attention "
            "layers have, and would do nothing here. Use ClassifierFreeGuidance, ClassifierFreeZeroStarGuidance, "
            "AdaptiveProjectedGuidance, AutoGuidance or SkipLayerGuidance, for example."
        )
    guider = copy.deepcopy(guider)
    guider.set_state(step=0, num_inference_steps=None, timestep=None)
    return guider


def check_guided_steps(guider: BaseGuidance, model: Any, scheduler: Any) -> None:
    """Check a guider of a call (see [`call_guider`]) against the steps of that call.

    Raises:
        `ValueError`: if it guides experts whose weights contain guidance, or skips no layer where it
            should.
    """
    name = type(guider).__name__
    experts = experts_of_steps(scheduler, model.config.expert_boundaries)
    guided, with_hooks = set(), set()
    for i, (expert, timestep) in enumerate(zip(experts, scheduler.timesteps)):
        guider.set_state(step=i, num_inference_steps=len(experts), timestep=timestep)
        if guider.num_conditions > 1:
            guided.add(expert)
        if isinstance(guider, AutoGuidance) and guider._is_ag_enabled():
            with_hooks.add(expert)
        if isinstance(guider, SkipLayerGuidance) and guider._is_slg_enabled():
            with_hooks.add(expert)
    guider.set_state(step=0, num_inference_steps=None, timestep=None)
    twice = sorted(guided & set(experts_with_guidance(model.sampling, model.config.num_experts)))
    if twice:
        raise ValueError(
            f"guider {name} would guide the experts {twice} a second time: guidance was trained or distilled "
            "into their weights. Call pipe.guider.disable(), or set its `start` and `stop`."
        )
    if isinstance(guider, AutoGuidance):
        _check_skipped_layers(name, guider.auto_guidance_config, "auto_guidance_config", model, with_hooks)
    elif isinstance(guider, SkipLayerGuidance):
        if guided and not with_hooks:
            raise ValueError(
                f"guider {name} skips layers at none of the {len(experts)} steps; use a smaller "
                "skip_layer_guidance_start or a larger skip_layer_guidance_stop."
            )
        _check_skipped_layers(name, guider.skip_layer_config, "skip_layer_config", model, with_hooks)


def _check_skipped_layers(
    name: str, configs: list[LayerSkipConfig], argument: str, model: Any, experts: set[int]
) -> None:
    """Check that a guider skips whole layers, and one of each of `experts` at least."""
    skipped: set[int] = set()
    for config in configs:
        is_whole = config.skip_attention and config.skip_ff and not config.skip_attention_scores
        # diffusers' arguments for layers alone make configurations that its hooks cannot read.
        if not isinstance(config.indices, list) or not is_whole or config.dropout != 1.0:
            raise ValueError(
                f"guider {name} can skip whole layers only, got {config}; use {argument}=LayerSkipConfig("
                "indices=[...], fqn='layers')."
            )
        config.fqn = "layers"
        skipped.update(config.indices)
    untouched = [expert for expert in experts if not skipped & set(model.expert_layers(expert))]
    if untouched or not skipped <= set(range(len(model.tower.layers))):
        layers = {expert: list(model.expert_layers(expert)) for expert in sorted(experts)}
        raise ValueError(
            f"guider {name} skips the layers {sorted(skipped)}, but needs a layer of each expert that it guides: "
            f"{layers}."
        )
    if has_forward_hooks(model) or getattr(model.tower, "expert_offload", None) is not None:
        raise ValueError(f"guider {name} cannot be used with off-loading or layerwise casting.")


def _own_modules(model: Any) -> Any:
    """The model with a tower of its own modules but the same weights: hooks on it concern no other call."""
    own = copy.copy(model)
    tensors = [*model.tower.parameters(), *model.tower.buffers()]
    tower = copy.deepcopy(model.tower, {id(tensor): tensor for tensor in tensors})
    for layer in tower.layers:
        layer.__class__ = _SkippableLayer
    own._modules = {**model._modules, "tower": tower}
    return own


class LatteFlowInputStep(ModularPipelineBlocks):
    """Checks the inputs of all blocks before any heavy work, and fills in the model's own steps and size."""

    model_name = MODEL_NAME
    description = "Checks all inputs, and fills in the size and the steps that the model has of its own."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return _components("model", "processor", "vae", "scheduler", "guider")

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs(
            *("prompt", "image", "messages", "negative_prompt", "context", "negative_context", "height", "width"),
            *("num_inference_steps", "steps_per_expert", "sigmas", "timesteps", "num_images_per_prompt", "generator"),
            *("output_type",),
        )

    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        s = self.get_block_state(state)
        pipe = _pipeline(components, "model", "scheduler", "guider")
        is_guided = call_guider(components.guider).num_conditions > 1
        s.height = pipe.default_size if s.height is None else s.height
        s.width = pipe.default_size if s.width is None else s.width
        s.num_inference_steps, s.steps_per_expert, _ = pipe._sampling_arguments(
            pipe.model.sampling,
            s.num_inference_steps,
            s.steps_per_expert,
            guidance_scale=1.0,  # A guider's scale is checked where its steps are known.
            has_sigmas=s.sigmas is not None or s.timesteps is not None,
        )
        pipe.check_inputs(
            prompt=s.prompt,
            image=s.image,
            messages=s.messages,
            negative_prompt=s.negative_prompt,
            height=s.height,
            width=s.width,
            num_inference_steps=s.num_inference_steps,
            guidance_scale=2.0 if is_guided else 1.0,
            guidance_interval=None,
            num_images_per_prompt=s.num_images_per_prompt,
            generator=s.generator,
            output_type=s.output_type,
            callback_on_step_end_tensor_inputs=[],
            context=s.context,
            negative_context=s.negative_context,
        )
        check_hooks(pipe.model)
        self.set_block_state(state, s)
        return components, state


class LatteFlowTextEncoderStep(ModularPipelineBlocks):
    """Prompts or conversations, images in them included -> `context` and, for a guider, `negative_context`."""

    model_name = MODEL_NAME
    description = "Encodes prompts or conversations and, if the guider needs them, negative prompts, in one prefill."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return _components("model", "processor", "guider")

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs("prompt", "image", "messages", "negative_prompt", "context", "negative_context")

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("context", type_hint=LatteFlowContext, description="The encoded prompts."),
            OutputParam("negative_context", type_hint=LatteFlowContext, description="As many; `None` without guider."),
        ]

    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        s = self.get_block_state(state)
        s.context, s.negative_context = _pipeline(components, "model", "guider").encode_prompt(
            s.prompt,
            s.image,
            s.messages,
            s.negative_prompt,
            do_classifier_free_guidance=call_guider(components.guider).num_conditions > 1,
            context=s.context,
            negative_context=s.negative_context,
        )
        self.set_block_state(state, s)
        return components, state


class LatteFlowSetTimestepsStep(ModularPipelineBlocks):
    """Steps -> a scheduler of the call, with its steps set."""

    model_name = MODEL_NAME
    description = "Sets the steps of a copy of the scheduler, which belongs to the call."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return _components("model", "scheduler", "guider")

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs(
            *("steps_per_expert", "sigmas", "timesteps", "latents"),
            required=("num_inference_steps",),
        )

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("call_scheduler", description="A copy of the scheduler, with the steps of the call.")]

    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        s = self.get_block_state(state)
        pipe = _pipeline(components, "model", "scheduler", "guider")
        model, sampling = pipe.model, pipe.model.sampling
        s.call_scheduler = copy.deepcopy(components.scheduler)
        if sampling != (model.config.sampling or {}):
            s.call_scheduler = distilled_scheduler(s.call_scheduler, sampling, model.config)
        set_timesteps(
            s.call_scheduler,
            s.num_inference_steps,
            pipe._execution_device,
            s.sigmas,
            s.timesteps,
            s.steps_per_expert,
            starts_from_noise=s.latents is None,
        )
        check_distilled_steps(s.call_scheduler.sigmas.tolist(), sampling, model.config.expert_boundaries)
        check_guided_steps(call_guider(components.guider), model, s.call_scheduler)
        self.set_block_state(state, s)
        return components, state


class LatteFlowPrepareLatentsStep(ModularPipelineBlocks):
    """Noise, or the given latents."""

    model_name = MODEL_NAME
    description = "Draws the noise from which the denoising starts, unless `latents` are given."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return _components("model", "vae")

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs(
            *("num_images_per_prompt", "generator", "latents"),
            required=("context", "height", "width"),
        )

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("latents", type_hint=torch.Tensor, description="(images, channels, height, width).")]

    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        s = self.get_block_state(state)
        pipe = _pipeline(components, "model")
        generator = list(s.generator) if isinstance(s.generator, tuple) else s.generator
        num_images = len(s.context) * int(s.num_images_per_prompt)
        size = int(s.height), int(s.width)
        s.latents = pipe.prepare_latents(
            num_images, *size, pipe.model.dtype, pipe._execution_device, generator, s.latents
        )
        self.set_block_state(state, s)
        return components, state


class LatteFlowLoopDenoiser(ModularPipelineBlocks):
    """One velocity: of the expert that owns the step, for the conditions that the guider chooses, combined by it."""

    model_name = MODEL_NAME
    description = "Predicts the velocity for each condition of the guider, and lets the guider combine them."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return _components("model", "guider")

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs("negative_context", required=("context", "latents"))

    def __call__(self, components: Any, s: Any, i: int, t: torch.Tensor) -> tuple[Any, Any]:
        s.guider.set_state(step=i, num_inference_steps=len(s.model_timesteps), timestep=t)
        batches = s.guider.prepare_inputs_from_block_state(s, GUIDER_INPUTS)
        # All conditions in one batch, in the order of the pipeline, unless a hook belongs to one of them.
        for group in [[batch] for batch in batches] if _has_hooks(s.guider) else [batches[::-1]]:
            context = self._join(s, [batch.context for batch in group])
            for _ in group:
                s.guider.prepare_models(s.call_model.tower)
            latents = torch.cat([s.latents] * len(group)) if len(group) > 1 else s.latents
            velocity = s.call_model.predict_velocity(
                latents,
                s.model_timesteps[i],
                context,
                expert=s.experts[i],
                modulation=None if s.modulation is None else s.modulation[i - s.experts.index(s.experts[i])],
                layout=self._layout(s, latents, context),
            )
            s.guider.cleanup_models(s.call_model.tower)
            for batch, prediction in zip(group, velocity.chunk(len(group))):
                batch.noise_pred = prediction
        s.velocity = s.guider(batches)[0]
        return components, s

    @staticmethod
    def _join(s: Any, contexts: list[LatteFlowContext]) -> LatteFlowContext:
        """The contexts of a group as one, joined once per call."""
        if len(contexts) == 1:
            return contexts[0]
        key = tuple(map(id, contexts))
        if key not in s.joined_contexts:
            s.joined_contexts[key] = LatteFlowContext.cat(contexts)
        return s.joined_contexts[key]

    @staticmethod
    def _layout(s: Any, latents: torch.Tensor, context: LatteFlowContext) -> Any:
        """Positions and masks, computed once per call."""
        if id(context) not in s.layouts:
            s.layouts[id(context)] = s.call_model.latent_layout(latents, context)
        return s.layouts[id(context)]


class LatteFlowLoopAfterDenoiser(ModularPipelineBlocks):
    """One step of the solver."""

    model_name = MODEL_NAME
    description = "Takes one step of the scheduler."

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs("generator", required=("latents", "call_scheduler"))

    def __call__(self, components: Any, s: Any, i: int, t: torch.Tensor) -> tuple[Any, Any]:
        scheduler = s.call_scheduler
        step_kwargs = generator_kwargs(scheduler, list(s.generator) if isinstance(s.generator, tuple) else s.generator)
        s.latents = scheduler.step(s.velocity, t, s.latents, **step_kwargs, return_dict=False)[0]
        s.latents = finish_step(scheduler, i, s.velocity, s.latents)
        return components, s


class LatteFlowDenoiseStep(LoopSequentialPipelineBlocks):
    """All steps. In between, more blocks can be inserted: they find `latents`, `velocity`, `experts` and others in
    their block state, and the arguments `i` (the evaluation) and `t` (the scheduler's timestep)."""

    model_name = MODEL_NAME
    block_classes = [LatteFlowLoopDenoiser, LatteFlowLoopAfterDenoiser]
    block_names = ["denoiser", "after_denoiser"]
    description = "Denoises the latents, with one expert at each step."

    @property
    def loop_expected_components(self) -> list[ComponentSpec]:
        return _components("model", "guider")

    @property
    def loop_inputs(self) -> list[InputParam]:
        return _inputs("negative_context", "generator", required=("context", "latents", "call_scheduler"))

    @property
    def loop_intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("latents", type_hint=torch.Tensor, description="Denoised, scaled as in training.")]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        s = self.get_block_state(state)
        model = _pipeline(components, "model", "guider").model
        check_hooks(model)
        s.guider, s.call_model = call_guider(components.guider), model
        if s.guider.num_conditions > 1 and s.negative_context is None:
            raise ValueError("negative_context is needed by the guider; encode it, or use guider.disable().")
        s.model_timesteps = model_timesteps(s.call_scheduler)
        s.experts = experts_of_steps(s.call_scheduler, model.config.expert_boundaries)
        s.joined_contexts, s.layouts, s.modulation = {}, {}, None
        check_guided_steps(s.guider, model, s.call_scheduler)
        if _has_hooks(s.guider):
            s.call_model = _own_modules(model)

        precompute = not runs_only_in_forward(model.tower)
        offload = getattr(model.tower, "expert_offload", None)
        num_steps = len(s.experts)
        with self.progress_bar(total=num_steps) as progress_bar:
            for i, t in enumerate(s.call_scheduler.timesteps):
                expert = s.experts[i]
                progress_bar.set_description(f"expert {expert} of {model.config.num_experts}")
                is_first = i == 0 or expert != s.experts[i - 1]
                is_last = i + 1 == num_steps or expert != s.experts[i + 1]
                if is_first and offload is not None:
                    offload.enter(expert)
                # Inserted blocks may change adapters between two steps.
                if precompute and (is_first or (len(self.sub_blocks) > 2 and getattr(model, "peft_config", None))):
                    first = s.experts.index(expert)
                    steps = s.model_timesteps[first : first + s.experts.count(expert)]
                    s.modulation = s.call_model.modulate(steps, expert)
                if is_last and offload is not None and i + 1 < num_steps:
                    offload.next_expert = s.experts[i + 1]
                components, s = self.loop_step(components, s, i=i, t=t)
                progress_bar.update()
        if offload is not None:
            offload.release_all()
        self.set_block_state(state, s)
        return components, state


class LatteFlowDecodeStep(ModularPipelineBlocks):
    """Latents -> images."""

    model_name = MODEL_NAME
    description = "Decodes the latents; `output_type='latent'` leaves them as they are."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return _components("vae", "model")

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs("output_type", required=("latents",))

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("images", description="Images in the form of `output_type`.")]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        s = self.get_block_state(state)
        if s.output_type == "latent":
            s.images = s.latents
        else:
            s.images = _pipeline(components, "vae").decode_latents(s.latents, s.output_type)
        self.set_block_state(state, s)
        return components, state


class LatteFlowBlocks(SequentialPipelineBlocks):
    """Prompts or conversations to images."""

    model_name = MODEL_NAME
    block_classes = [
        LatteFlowInputStep,
        LatteFlowSetTimestepsStep,
        LatteFlowTextEncoderStep,
        LatteFlowPrepareLatentsStep,
        LatteFlowDenoiseStep,
        LatteFlowDecodeStep,
    ]
    block_names = ["input", "set_timesteps", "text_encoder", "prepare_latents", "denoise", "decode"]
    description = "Generates images from prompts or conversations, with images in them, with one expert at each step."

    @property
    def outputs(self) -> list[OutputParam]:
        return [OutputParam("images", description="The generated images.")]


class LatteFlowModularPipeline(LatteFlowLoraMixin, ModularPipeline):
    """Generates images with [`LatteFlowBlocks`] or other blocks, and with a guider of diffusers.

    `ModularPipeline.from_pretrained(folder)` makes one of any checkpoint of [`LatteFlowPipeline`];
    `load_components()` then loads the weights. At the same seed and scale, the guider `ClassifierFreeGuidance` gives
    the same latents as [`LatteFlowPipeline`], bit for bit.
    """

    default_blocks_name = "LatteFlowBlocks"

    def __call__(
        self, state: PipelineState | None = None, output: str | list[str] | None = None, **kwargs: Any
    ) -> Any:
        """Same as `ModularPipeline.__call__`, but an unknown input is an error.

        Raises:
            `ValueError`: if an input is unknown, which diffusers would ignore, or invalid.
        """
        unknown = sorted(set(kwargs) - set(self._blocks.input_names))
        if unknown:
            raise ValueError(
                f"{', '.join(unknown)}: no input of these blocks, which take {self._blocks.input_names}. (Guidance is "
                "set by the guider: pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=4.0)).)"
            )
        with one_thread_at_a_time(getattr(self, "model", None), getattr(self, "vae", None)):
            return super().__call__(state, output, **kwargs)

    def load_components(self, names: list[str] | str | None = None, **kwargs: Any) -> None:
        """Same as `ModularPipeline.load_components`, but what cannot be loaded is an error.

        Raises:
            `OSError`: if a component cannot be loaded, or the autoencoder lacks tensors.
            `ValueError`: if there is no such component.
        """
        specs = self._component_specs
        if names is None:
            # A component without a type is left out in the checkpoint.
            names = [
                name
                for name, spec in specs.items()
                if spec.pretrained_model_name_or_path is not None and spec.type_hint is not None
                if getattr(self, name) is None
            ]
        names = [names] if isinstance(names, str) else list(names)
        unknown = sorted(set(names) - specs.keys())
        if unknown:
            raise ValueError(f"names must be among {list(specs)}, got {unknown}.")
        for name in names:
            spec = specs[name]
            if isinstance(spec.pretrained_model_name_or_path, Path):  # diffusers wants strings.
                spec.pretrained_model_name_or_path = str(
                    spec.pretrained_model_name_or_path
                )  # diffusers wants strings.
            folder = Path(str(spec.pretrained_model_name_or_path), spec.subfolder or "")
            if name == "vae" and (folder / "config.json").is_file():
                check_autoencoder(folder)
        super().load_components(names, **kwargs)
        failed = [name for name in names if getattr(self, name) is None]
        if failed:
            raise OSError(f"{', '.join(failed)}: could not be loaded; the log above says why.")

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Same as `ModularPipeline.save_pretrained`, and saves the guider too, with its present settings."""
        guider = getattr(self, "guider", None)
        if guider is not None:
            # `guider.guidance_scale = 3` and `guider.disable()` do not change its configuration.
            now = vars(guider)
            settings = {
                name: now.get(name, now.get(f"_{name}", value))
                for name, value in guider.config.items()
                if value is None or isinstance(value, (bool, int, float))
            }
            guider.register_to_config(**settings)
            spec = ComponentSpec("guider", type(guider), subfolder="guider")
            self._component_specs["guider"] = spec
            self.register_to_config(
                guider=(
                    type(guider).__module__.split(".")[0],
                    type(guider).__name__,
                    self._component_spec_to_dict(spec),
                )
            )
        kwargs.setdefault("overwrite_modular_index", True)
        super().save_pretrained(str(save_directory), *args, **kwargs)
