# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""What one training step costs in operations and bytes: pure functions of shapes.

Operations are those of matrix products and convolutions; a multiplication and an addition are two. Attention counts
as its matrix products over all keys, hidden ones included, whatever kernel computes it. Bytes of activations are those
that a forward pass keeps for the backward pass, tensor by tensor, as the code of the tower's layers does it.

Shapes: n images of one expert, N latent tokens of each, T prompt tokens of each, D hidden size, H heads, G key-value
heads, d head size, I width of the feed-forward part.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """Bytes per number.

    Args:
        stored (`int`): of weights, gradients, and hidden states between the layers.
        product (`int`): of the inputs of matrix products: 2 with mixed precision (`bf16` and `fp16` of the recipe).
    """

    stored: int
    product: int

    @property
    def is_mixed(self) -> bool:
        """Whether matrix products cast their inputs, each one its own."""
        return self.stored > self.product


@dataclass(frozen=True)
class Projection:
    """A linear map.

    Args:
        num_inputs, num_outputs (`int`): its sizes.
        is_trained (`bool`): whether its own weight is trained.
        rank (`int`, defaults to 0): of the low-rank adapter on it; 0 is none.
    """

    num_inputs: int
    num_outputs: int
    is_trained: bool
    rank: int = 0

    @property
    def learns(self) -> bool:
        return self.is_trained or self.rank > 0

    @property
    def num_weights(self) -> int:
        """Elements of its matrices, that of the adapter included."""
        return self.num_inputs * self.num_outputs + self.rank * (self.num_inputs + self.num_outputs)

    def forward(self, rows: int) -> int:
        """Operations for this many rows."""
        return 2 * rows * self.num_weights

    def backward(self, rows: int, needs_input_gradient: bool) -> int:
        """Operations of the gradients of the weights that are trained and, if needed, of the input."""
        own = 2 * rows * self.num_inputs * self.num_outputs
        down, up = 2 * rows * self.rank * self.num_inputs, 2 * rows * self.rank * self.num_outputs
        # The second matrix of an adapter always passes a gradient on to the first one.
        return (own + down) * needs_input_gradient + own * self.is_trained + down + 2 * up


@dataclass(frozen=True)
class LayerShape:
    """One layer of the tower.

    Args:
        hidden_size, num_heads, num_groups, head_dim (`int`): D, H, G and d.
        attention_inputs (`tuple[Projection, ...]`): to queries, keys and values.
        attention_output (`Projection`): of the attention.
        mlp_inputs (`tuple[Projection, ...]`): the first linear maps of the feed-forward part.
        mlp_output (`Projection`): its last one.
        modulation (`Projection`): timestep embedding to the four modulation vectors.
        gate (`Projection`, *optional*): timestep embedding to the gate of the residual attention.
        trains_norms (`bool`): whether the weights of the norms are trained.
        has_head_norms (`bool`): whether queries and keys have norms.
        is_gated (`bool`): whether the feed-forward part multiplies two of its projections (SwiGLU).
        is_parallel (`bool`): whether attention and feed-forward stand side by side.
        has_softcap (`bool`, defaults to `False`): whether the scores of the attention are limited by a tanh.
    """

    hidden_size: int
    num_heads: int
    num_groups: int
    head_dim: int
    attention_inputs: tuple[Projection, ...]
    attention_output: Projection
    mlp_inputs: tuple[Projection, ...]
    mlp_output: Projection
    modulation: Projection
    gate: Projection | None
    trains_norms: bool
    has_head_norms: bool
    is_gated: bool
    is_parallel: bool
    has_softcap: bool = False

    @property
    def projections(self) -> tuple[Projection, ...]:
        gate = () if self.gate is None else (self.gate,)
        mlp = (*self.mlp_inputs, self.mlp_output)
        return (*self.attention_inputs, self.attention_output, *mlp, self.modulation, *gate)


@dataclass(frozen=True)
class TowerShape:
    """The tower.

    Args:
        experts (`tuple[tuple[LayerShape, ...], ...]`): the layers of each expert.
        latent_channels, patch_size, kernel_size (`int`): of the embedding of latents.
        trains_embedding (`bool`): whether that embedding is trained.
        timestep_embedding (`tuple[Projection, Projection]`): its two linear maps.
        head_modulation, head (`Projection`): of the head.
        trains_head_norm (`bool`): whether the norm of the head is trained.
        residual_attention (`str`, *optional*): see [`LatteFlowConfig`].
        is_fused (`bool`): whether attention without a residual runs in a kernel that keeps no attention weights.
    """

    experts: tuple[tuple[LayerShape, ...], ...]
    latent_channels: int
    patch_size: int
    kernel_size: int
    trains_embedding: bool
    timestep_embedding: tuple[Projection, Projection]
    head_modulation: Projection
    head: Projection
    trains_head_norm: bool
    residual_attention: str | None
    is_fused: bool

    @property
    def shared_projections(self) -> tuple[Projection, ...]:
        return (*self.timestep_embedding, self.head_modulation, self.head)

    @property
    def trains_timestep(self) -> bool:
        return any(projection.learns for projection in self.timestep_embedding)


@dataclass(frozen=True)
class DecoderShape:
    """The backbone's decoder, which reads the prompts.

    Args:
        layer_weights (`tuple[int, ...]`): of each layer, the elements of its matrices.
        num_heads, num_groups, head_dim (`int`): H, G and d.
    """

    layer_weights: tuple[int, ...]
    num_heads: int
    num_groups: int
    head_dim: int


@dataclass(frozen=True)
class Examples:
    """The examples that one expert gets: n images of N latent tokens, each with a prompt of T tokens.

    Args:
        num_images, num_tokens, num_context (`int`): n, N and T.
        is_padded (`bool`, defaults to `True`): whether prompts of a batch differ in length.
    """

    num_images: int
    num_tokens: int
    num_context: int
    is_padded: bool = True

    @property
    def rows(self) -> int:
        return self.num_images * self.num_tokens


@dataclass(frozen=True)
class Flops:
    """Operations of the forward pass, of the backward pass, and of what is computed without gradients."""

    forward: int = 0
    backward: int = 0
    without_gradients: int = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            self.forward + other.forward,
            self.backward + other.backward,
            self.without_gradients + other.without_gradients,
        )

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.without_gradients


@dataclass(frozen=True)
class Gradients:
    """Which tensors require gradients where a layer begins.

    Args:
        hidden, timestep (`bool`): the hidden states, and the timestep embedding.
        attention_map (`bool`, defaults to `False`): the attention map of the layer before.
    """

    hidden: bool
    timestep: bool
    attention_map: bool = False


@dataclass(frozen=True)
class LayerGradients:
    """Which tensors inside of a layer require gradients, and with them what its backward pass computes and keeps.

    Args:
        hidden (`bool`): the hidden states where the layer begins.
        normed (`bool`): the input of queries, keys and values.
        query (`bool`): queries, keys and values.
        gated (`bool`): the gated attention map of the layer before.
        weights (`bool`): the attention weights, and the output of the attention.
        vectors (`bool`): the vectors of the modulation.
        between (`bool`): the hidden states between attention and feed-forward part.
        mlp (`bool`): the input of the feed-forward part.
        mlp_hidden (`bool`): the input of its last linear map.
        output (`bool`): the hidden states where the layer ends.
    """

    hidden: bool
    normed: bool
    query: bool
    gated: bool
    weights: bool
    vectors: bool
    between: bool
    mlp: bool
    mlp_hidden: bool
    output: bool

    @classmethod
    def of(cls, layer: LayerShape, entering: Gradients) -> "LayerGradients":
        normed = entering.hidden or layer.trains_norms
        query = normed or any(projection.learns for projection in layer.attention_inputs)
        gated = layer.gate is not None and (layer.gate.learns or entering.timestep or entering.attention_map)
        weights = query or gated
        vectors = layer.modulation.learns or entering.timestep
        attended = weights or layer.attention_output.learns or layer.trains_norms or vectors
        between = entering.hidden or attended
        mlp = (normed if layer.is_parallel else between) or layer.trains_norms or vectors
        mlp_hidden = mlp or any(projection.learns for projection in layer.mlp_inputs)
        output = between or mlp_hidden or layer.mlp_output.learns
        return cls(entering.hidden, normed, query, gated, weights, vectors, between, mlp, mlp_hidden, output)


def layer_flops(
    layer: LayerShape, residual_attention: str | None, examples: Examples, gradients: LayerGradients
) -> Flops:
    """Operations of one layer: forward, and the gradients that are needed."""
    rows, num_latents, num_context = examples.rows, examples.num_tokens, examples.num_context
    # The product of all queries with one key each, or of their weights with one value each.
    product = 2 * rows * layer.num_heads * layer.head_dim
    forward = 2 * product * (num_context + num_latents)
    backward = gradients.weights * product * (num_context + num_latents)
    if residual_attention == "scores":
        # Gradients of queries; of keys and values, those of the latents alone: the prompt's are constants.
        backward += gradients.query * product * (num_context + 3 * num_latents)
    else:
        # Keys and values of prompt and latents are one tensor.
        backward += gradients.query * 3 * product * (num_context + num_latents)
    if residual_attention == "probabilities":
        # transformers' eager attention gives the weights, and an output without the residual, which is not used.
        forward += product * (num_context + num_latents)
    # Each projection, its number of rows, and whether its input requires gradients.
    entries = [(projection, rows, gradients.normed) for projection in layer.attention_inputs]
    entries += [(projection, rows, gradients.mlp) for projection in layer.mlp_inputs]
    entries += [
        (layer.attention_output, rows, gradients.weights),
        (layer.mlp_output, rows, gradients.mlp_hidden),
    ]
    flops = Flops(forward, backward)
    for projection, num_rows, needs_input_gradient in entries:
        flops += Flops(projection.forward(num_rows), projection.backward(num_rows, needs_input_gradient))
    return flops


def conditioning_flops(projections: Sequence[Projection], num_images: int, trains_timestep: bool) -> Flops:
    """Operations of linear maps of the timestep embedding, which have one row per image."""
    return Flops(
        sum(projection.forward(num_images) for projection in projections),
        sum(projection.backward(num_images, trains_timestep) for projection in projections),
    )


def gradients_of_layers(tower: TowerShape, expert: int, checkpointing: bool = False) -> list[LayerGradients]:
    """Which tensors require gradients in each layer of an expert. Checkpointing asks for those of its input."""
    entering, found = Gradients(tower.trains_embedding or checkpointing, tower.trains_timestep), []
    for layer in tower.experts[expert]:
        found.append(LayerGradients.of(layer, entering))
        entering = Gradients(found[-1].output, tower.trains_timestep, found[-1].weights)
    return found


def expert_flops(
    tower: TowerShape, expert: int, examples: Examples, checkpointing: bool = False, evaluations: int = 0
) -> Flops:
    """Operations of one expert for its examples: loss and gradients.

    Args:
        tower ([`TowerShape`]): the tower.
        expert (`int`): the expert.
        examples ([`Examples`]): its examples.
        checkpointing (`bool`, defaults to `False`): whether the backward pass computes the layers once more.
        evaluations (`int`, defaults to 0): further evaluations without gradients.
    """
    num_images, rows = examples.num_images, examples.rows
    embedding = 2 * rows * tower.latent_channels * tower.kernel_size**2 * tower.head.num_inputs
    flops = Flops(embedding, embedding * tower.trains_embedding)
    first, second = tower.timestep_embedding
    flops += Flops(first.forward(num_images), first.backward(num_images, False))
    flops += Flops(second.forward(num_images), second.backward(num_images, first.learns))
    gradients = gradients_of_layers(tower, expert, checkpointing)
    for layer, of_layer in zip(tower.experts[expert], gradients):
        conditioned = [layer.modulation] + ([] if layer.gate is None else [layer.gate])
        once = layer_flops(layer, tower.residual_attention, examples, of_layer)
        once += conditioning_flops(conditioned, num_images, tower.trains_timestep)
        flops += once
        if checkpointing:
            flops += Flops(backward=once.forward)
    flops += conditioning_flops([tower.head_modulation], num_images, tower.trains_timestep)
    learns_before = gradients[-1].output or tower.trains_head_norm or tower.head_modulation.learns
    flops += Flops(tower.head.forward(rows), tower.head.backward(rows, learns_before or tower.trains_timestep))
    return flops + Flops(without_gradients=evaluations * flops.forward)


def prefill_flops(decoder: DecoderShape, num_prompts: int, num_context: int, num_layers: int | None = None) -> int:
    """Operations of the backbone's decoder that reads prompts of T tokens without images.

    Args:
        decoder ([`DecoderShape`]): the decoder.
        num_prompts, num_context (`int`): how many prompts, and T.
        num_layers (`int`, *optional*): only the first layers; all of them if not given.
    """
    tokens = num_prompts * num_context
    attention = 4 * tokens * num_context * decoder.num_heads * decoder.head_dim
    return sum(2 * tokens * weights + attention for weights in decoder.layer_weights[:num_layers])


def layer_activations(
    layer: LayerShape,
    residual_attention: str | None,
    is_fused: bool,
    examples: Examples,
    precision: Precision,
    gradients: LayerGradients,
    position: int,
) -> int:
    """Bytes that one layer keeps for its backward pass. The keys and values of the prompt are not among them, where
    the attention does not copy them.

    Args:
        layer ([`LayerShape`]): the layer.
        residual_attention, is_fused: see [`TowerShape`].
        examples ([`Examples`]): the examples of its expert.
        precision ([`Precision`]): bytes per number.
        gradients ([`LayerGradients`]): what requires gradients.
        position (`int`): of the layer in its expert; 0 is the first one.
    """
    hidden_size, head_dim = layer.hidden_size, layer.head_dim
    stored, product = precision.stored, precision.product

    def inputs(projections: Sequence[Projection], size: int) -> int:
        """What projections of the same input keep: the input, a copy for each with mixed precision."""
        num_learning = sum(projection.learns for projection in projections)
        copies = num_learning if precision.is_mixed else min(num_learning, 1)
        return product * (copies * size + sum(projection.rank for projection in projections))

    # In float32 whatever the dtype: the input of a norm, and what it divides by.
    norm = 4 * hidden_size + 4
    normed, modulated = hidden_size * layer.trains_norms, hidden_size * gradients.vectors
    # Per latent token.
    row = norm * gradients.hidden + stored * normed
    row += inputs(layer.attention_inputs, hidden_size)
    if layer.has_head_norms and gradients.query:
        row += (layer.num_heads + layer.num_groups) * (head_dim * (4 + product * layer.trains_norms) + 4)
    if gradients.weights:
        row += attention_row(layer, residual_attention, is_fused, examples, precision, gradients, position)
    if residual_attention is not None or not is_fused or not gradients.weights:
        # A fused kernel keeps its output, which is the same tensor.
        row += inputs([layer.attention_output], layer.num_heads * head_dim)
    # The norms after attention and feed-forward, and the factors of the modulation.
    row += norm * (gradients.weights or layer.attention_output.learns) + product * normed + stored * modulated
    row += norm * (gradients.mlp_hidden or layer.mlp_output.learns) + product * normed + stored * modulated
    row += stored * modulated if layer.is_parallel else norm * gradients.between + stored * (normed + modulated)
    row += inputs(layer.mlp_inputs, hidden_size)
    size = layer.mlp_output.num_inputs
    row += product * size * (3 if layer.is_gated else 1) * gradients.mlp_hidden + inputs([layer.mlp_output], size)
    # Per image: the four vectors of the modulation, and one of them plus 1.
    return examples.rows * row + examples.num_images * 5 * hidden_size * product


def attention_row(
    layer: LayerShape,
    residual_attention: str | None,
    is_fused: bool,
    examples: Examples,
    precision: Precision,
    gradients: LayerGradients,
    position: int,
) -> int:
    """Bytes that attention keeps, per latent token; arguments as for [`layer_activations`]."""
    num_heads, head_dim, product = layer.num_heads, layer.head_dim, precision.product
    num_latents = examples.num_tokens
    num_keys = examples.num_context + num_latents
    queries = num_heads * head_dim * product
    # Of keys and values together; those of the prompt count per latent token, too.
    groups = 2 * layer.num_groups * head_dim * product
    repeated = 2 * num_heads * head_dim * product * num_keys / num_latents
    if residual_attention is None and is_fused:
        # transformers repeats keys and values for the heads of a group if there is a mask.
        keys_and_values = repeated if examples.is_padded else groups * num_keys / num_latents
        return math.ceil(queries + keys_and_values + queries + 4 * num_heads)
    # In float32, and the copy that is multiplied with the values.
    weights = 4 * num_heads * num_keys + product * num_heads * num_keys * layer.has_softcap
    if residual_attention == "scores":
        if precision.is_mixed:
            weights += product * num_heads * num_latents
        elif product < 4:
            weights += product * num_heads * num_keys
        return queries + groups + weights + product * num_heads * num_latents * gradients.gated
    if product < 4 or gradients.gated:
        weights += product * num_heads * num_keys
    # The map of the layer before; that of the first layer is among its weights.
    attention_map = precision.stored * num_heads * num_latents * (gradients.gated and position > 1)
    return math.ceil(queries + repeated + weights + attention_map)


def largest_layer_activations(tower: TowerShape, expert: int, examples: Examples, precision: Precision) -> int:
    """Bytes that one layer keeps while checkpointing computes it once more: those of the largest layer."""
    return max(_activations_of_layers(tower, expert, examples, precision, checkpointing=True), default=0)


def _activations_of_layers(
    tower: TowerShape, expert: int, examples: Examples, precision: Precision, checkpointing: bool
) -> list[int]:
    layers = zip(tower.experts[expert], gradients_of_layers(tower, expert, checkpointing))
    return [
        layer_activations(layer, tower.residual_attention, tower.is_fused, examples, precision, gradients, position)
        for position, (layer, gradients) in enumerate(layers)
    ]


def expert_activations(
    tower: TowerShape, expert: int, examples: Examples, precision: Precision, checkpointing: bool = False
) -> int:
    """Bytes that the forward pass of one expert keeps for its backward pass, without keys and values of the prompt.

    With `checkpointing` these are the inputs of its layers alone.
    """
    layers = tower.experts[expert]
    first, stored, product = layers[0], precision.stored, precision.product
    if checkpointing:
        num_latents, maps = examples.num_tokens, 0
        if tower.residual_attention == "scores":
            maps = (len(layers) - 1) * product * num_latents
        elif tower.residual_attention == "probabilities" and len(layers) > 1:
            # The map of the first layer is a part of its weights.
            maps = 4 * (examples.num_context + num_latents) + (len(layers) - 2) * stored * num_latents
        total = examples.rows * (len(layers) * stored * first.hidden_size + maps * first.num_heads)
    else:
        total = sum(_activations_of_layers(tower, expert, examples, precision, checkpointing))
    gradients = gradients_of_layers(tower, expert, checkpointing)[-1]
    modulated = tower.head_modulation.learns or tower.trains_timestep
    head = (4 * first.hidden_size + 4) * gradients.output
    head += stored * first.hidden_size * (tower.trains_head_norm + modulated)
    head += product * first.hidden_size * tower.head.learns
    # Latents: as embedded; velocity and target. Positions: sines and cosines.
    latents = tower.latent_channels * tower.patch_size**2 * (product * tower.trains_embedding + 8)
    return total + examples.rows * (head + latents + 2 * stored * first.head_dim)


def layer_work_bytes(tower: TowerShape, expert: int, examples: Examples, precision: Precision) -> int:
    """Bytes that the forward pass of one layer needs for a moment where nothing is kept: the tensors of the
    feed-forward part or of the attention, whichever are more, and hidden states in float32."""
    num_keys = examples.num_context + examples.num_tokens
    return examples.rows * max(
        12 * layer.hidden_size
        + max(
            4 * layer.mlp_output.num_inputs * precision.product,
            layer.num_heads * num_keys * (4 + 2 * precision.product),
        )
        for layer in tower.experts[expert]
    )


def half_precision_weights(tower: TowerShape, experts: Sequence[int], precision: Precision) -> int:
    """Bytes of the copies of the tower's matrices that mixed precision makes, and keeps for the backward pass."""
    if not precision.is_mixed:
        return 0
    projections = [*tower.shared_projections]
    for expert in experts:
        projections += [projection for layer in tower.experts[expert] for projection in layer.projections]
    return precision.product * sum(projection.num_weights for projection in projections)


def context_bytes(decoder: DecoderShape, num_prompts: int, num_context: int, width: int, num_layers: int) -> int:
    """Bytes of keys and values of prompts of T tokens in this many layers, `width` bytes per number."""
    return 2 * num_layers * num_prompts * decoder.num_groups * num_context * decoder.head_dim * width


# Numbers per weight that an optimizer keeps, of the same dtype as the weight.
OPTIMIZER_STATES = {
    "adamw_torch": 2,
    "adamw_torch_fused": 2,
    "adagrad": 1,
    "rmsprop": 1,
    "sgd": 0,
}
# bitsandbytes: numbers per weight, one byte each, and a float32 scale for each block.
EIGHT_BIT_STATES = {
    "adamw_8bit": 2,
    "adamw_bnb_8bit": 2,
    "paged_adamw_8bit": 2,
    "lion_8bit": 1,
    "paged_lion_8bit": 1,
}
EIGHT_BIT_BLOCK = 256
# Smaller tensors keep their state in float32 there.
EIGHT_BIT_SMALLEST = 4096
# bitsandbytes in float32.
FLOAT32_STATES = {"paged_adamw_32bit": 2, "lion_32bit": 1, "paged_lion_32bit": 1}
KNOWN_OPTIMIZERS = sorted([*OPTIMIZER_STATES, *EIGHT_BIT_STATES, *FLOAT32_STATES, "adafactor"])


def optimizer_bytes(optimizer: str, shapes: Sequence[tuple[int, ...]], width: int) -> int:
    """Bytes of the state of an optimizer.

    Args:
        optimizer (`str`): its name in `TrainingArguments.optim`.
        shapes (`list[tuple[int, ...]]`): of the weights that are trained.
        width (`int`): bytes per number of a weight.

    Raises:
        `ValueError`: if nothing is known of this optimizer.
    """
    sizes = [math.prod(shape) for shape in shapes]
    if optimizer in OPTIMIZER_STATES:
        return OPTIMIZER_STATES[optimizer] * width * sum(sizes)
    if optimizer in FLOAT32_STATES:
        return FLOAT32_STATES[optimizer] * 4 * sum(sizes)
    if optimizer in EIGHT_BIT_STATES:
        states, small = EIGHT_BIT_STATES[optimizer], [size for size in sizes if size < EIGHT_BIT_SMALLEST]
        large = sum(sizes) - sum(small)
        return states * (4 * sum(small) + large + 4 * math.ceil(large / EIGHT_BIT_BLOCK))
    if optimizer == "adafactor":
        # A sum for each row and each column of a matrix.
        return width * sum(
            size // shape[-1] + size // shape[-2] if len(shape) > 1 else size for size, shape in zip(sizes, shapes)
        )
    raise ValueError(
        f"training: optim {optimizer!r}: the memory of this optimizer is not known here; known are {KNOWN_OPTIMIZERS}."
    )


def optimizer_work_bytes(optimizer: str, shapes: Sequence[tuple[int, ...]], width: int) -> int:
    """Bytes that a step of an optimizer needs for a moment."""
    sizes = [math.prod(shape) for shape in shapes]
    if optimizer == "adamw_torch":
        # torch computes the roots of the second moments of all weights at once.
        return width * sum(sizes)
    # Weight by weight: its update, and one intermediate of the same size.
    return 0 if optimizer in ("adamw_torch_fused", "sgd") else 2 * width * max(sizes, default=0)


def update_traffic(trained: int, state: int, clips: bool, averages: bool) -> int:
    """Bytes that the step of an optimizer reads and writes in the memory of a device.

    Args:
        trained (`int`): bytes of the weights that are trained.
        state (`int`): bytes of the state of the optimizer.
        clips (`bool`): whether gradients are limited by their norm (`max_grad_norm`): read once, then scaled.
        averages (`bool`): whether averages of the weights are on the device.
    """
    # Weights and state are read and written, gradients read; averages are read and written, and weights read again.
    return 3 * trained + 2 * state + 3 * trained * clips + 3 * trained * averages
