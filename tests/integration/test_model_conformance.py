# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""What transformers asks of every model (`ModelTesterMixin`, `GenerationTesterMixin`), and tests/modeling does not.

The mixins themselves live in transformers' own test folder, which is not installed. Where the stock backbone is the
oracle, equal means the same bits.
"""

import copy
import inspect
import pickle

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    Qwen2VLForConditionalGeneration,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from latte_flow_hf import LatteFlowConfig, LatteFlowForConditionalGeneration


CLOSE = {"rtol": 1e-4, "atol": 1e-4}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
QUESTIONS = ("what is this?", "how many shapes are there in the picture?")
TIMESTEPS = (730.0, 210.0)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same_bytes(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@torch.no_grad()
def velocity(model, inputs, timestep=730.0) -> torch.Tensor:
    latents = noise(len(inputs["input_ids"]), 4, 4, 4).to(model.dtype)
    return model.predict_velocity(latents, timestep, model.encode_context(**inputs))


@pytest.fixture(scope="module")
def inputs(encode):
    """Two questions of different lengths, without pictures."""
    return encode(*QUESTIONS)


@pytest.fixture(scope="module")
def seen(encode, picture):
    """The same about a picture."""
    return encode(*QUESTIONS, image=picture)


@pytest.fixture(scope="module")
def stock_outputs(backbone, seen):
    """Everything that the stock class can be made to tell."""
    eager = copy.deepcopy(backbone)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        return eager(**seen, output_attentions=True, output_hidden_states=True, labels=seen["input_ids"])


# What a model looks like from outside.


def test_forward_takes_what_a_model_takes():
    parameters = inspect.signature(LatteFlowForConditionalGeneration.forward).parameters
    assert list(parameters)[1:4] == ["input_ids", "attention_mask", "pixel_values"]
    assert {"image_grid_thw", "labels", "latents"} <= set(parameters)
    assert list(parameters.values())[-1].kind is inspect.Parameter.VAR_KEYWORD


def test_model_tells_what_generic_code_asks(model):
    assert model.can_generate() and model.main_input_name == "input_ids"
    assert model.base_model is model.vlm
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    # A device map never cuts a layer with a residual connection in two.
    assert set(model._no_split_modules) >= {"LatteFlowLayer", *model.vlm._no_split_modules}
    tower, vlm = (sum(p.numel() for p in part.parameters()) for part in (model.tower, model.vlm))
    assert model.num_parameters() == tower + vlm
    assert model.num_parameters(only_trainable=True) == tower
    assert model.get_memory_footprint(return_buffers=False) == 4 * (tower + vlm)


def test_tower_is_tied_to_nothing(model):
    tied = model.get_output_embeddings().weight
    assert tied is model.get_input_embeddings().weight
    names = [name for name, _ in model.tower.named_parameters(remove_duplicate=False)]
    pointers = {p.data_ptr() for p in model.tower.parameters()}
    assert len(names) == len(pointers)
    assert not pointers & {p.data_ptr() for p in model.vlm.parameters()}


def test_config_round_trip(model):
    again = LatteFlowConfig.from_dict(model.config.to_dict())
    assert again.to_dict() == model.config.to_dict()
    assert again.to_diff_dict() == model.config.to_diff_dict()
    assert copy.deepcopy(model.config).to_dict() == model.config.to_dict()
    assert pickle.loads(pickle.dumps(model.config)).to_dict() == model.config.to_dict()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_clone_is_the_same_and_apart(model, seen, clone):
    other = clone(model)
    assert same_bytes(other, model)
    assert other.config.vlm_config is other.vlm.config
    assert other.get_output_embeddings().weight is other.get_input_embeddings().weight
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in model.parameters()]
    assert torch.equal(velocity(other, seen), velocity(model, seen))
    with torch.no_grad():
        assert torch.equal(other(**seen).logits, model(**seen).logits)
    assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in model.parameters()}


# What forward gives.


@pytest.mark.parametrize("how", ["argument", "config"])
def test_attentions_and_hidden_states_are_the_backbone_s(model, seen, stock_outputs, how):
    ours = copy.deepcopy(model)
    ours.set_attn_implementation("eager")
    asked = {"output_attentions": True, "output_hidden_states": True}
    if how == "config":
        for name in asked:
            setattr(ours.config.text_config, name, True)
        asked = {}
    with torch.no_grad():
        found = ours(**seen, **asked)
    batch, length = seen["input_ids"].shape
    assert [tuple(a.shape) for a in found.attentions] == [(batch, 4, length, length)] * 4
    assert [tuple(h.shape) for h in found.hidden_states] == [(batch, length, 32)] * 5
    assert all(map(torch.equal, found.attentions, stock_outputs.attentions))
    assert all(map(torch.equal, found.hidden_states, stock_outputs.hidden_states))


def test_text_tuple_is_the_record_without_its_names(model, seen):
    asked = {**seen, "labels": seen["input_ids"], "output_hidden_states": True, "use_cache": False}
    with torch.no_grad():
        record, found = model(**asked), model(**asked, return_dict=False)
    assert isinstance(found, tuple)
    assert torch.equal(found[0], record.loss) and torch.equal(found[1], record.logits)
    assert all(map(torch.equal, found[2], record.hidden_states))


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("how", ["argument", "config"])
def test_training_tuple_is_the_record_without_its_names(make_model, inputs, labels, how):
    model = make_model()
    asked = {**inputs, "latents": noise(2, 4, 4, 4), "labels": inputs["input_ids"] if labels else None}
    record = model(**asked, generator=torch.Generator().manual_seed(0))
    # `None` is transformers' own word for "as the configuration has it".
    assert type(model(**asked, return_dict=None)) is type(record)
    if how == "config":
        model.config.return_dict = False
    else:
        asked["return_dict"] = False
    found = model(**asked, generator=torch.Generator().manual_seed(0))
    assert isinstance(found, tuple)
    assert all(map(torch.equal, found, record.to_tuple()))


def test_loss_is_the_backbone_s(model, seen, stock_outputs):
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        assert torch.equal(eager(**seen, labels=seen["input_ids"]).loss, stock_outputs.loss)


def test_embeddings_and_positions_in_place_of_tokens(model, backbone, inputs):
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    given = {
        "inputs_embeds": backbone.get_input_embeddings()(inputs["input_ids"]),
        "attention_mask": inputs["attention_mask"],
    }
    with torch.no_grad():
        found = model(**given, position_ids=positions.expand(3, -1, -1)).logits
        assert torch.equal(found, backbone(**given, position_ids=positions.expand(3, -1, -1)).logits)
        torch.testing.assert_close(found, model(**inputs).logits, **CLOSE)
        # Positions are read, not recomputed.
        other = model(**given, position_ids=(3 * positions).expand(3, -1, -1)).logits
    assert (other - found).abs().max() > 1e-3


def test_cache_continues_where_it_ended(model, inputs):
    tokens, cut = inputs["input_ids"][1:], 5
    positions = torch.arange(tokens.shape[1]).expand(3, 1, -1)
    with torch.no_grad():
        whole = model(input_ids=tokens).logits
        first = model(input_ids=tokens[:, :cut], past_key_values=DynamicCache(config=model.config), use_cache=True)
        rest = model(
            input_ids=tokens[:, cut:], position_ids=positions[..., cut:], past_key_values=first.past_key_values
        )
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], dim=1), whole, **CLOSE)
    assert rest.past_key_values.get_seq_length() == tokens.shape[1]


@pytest.mark.parametrize("with_picture", [False, True])
def test_padding_side_makes_no_difference_to_text(model, processor, picture, with_picture):
    conversations = [processor.conversation(text, picture if with_picture else None) for text in QUESTIONS]
    found = {}
    for side in ("left", "right"):
        batch = processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": side},
        )
        assert (batch["attention_mask"] == 0).any()
        with torch.no_grad():
            found[side] = model(**batch).logits[batch["attention_mask"].bool()]
    torch.testing.assert_close(found["left"], found["right"], **CLOSE)


def test_several_pictures_and_turns(model, backbone, processor, picture):
    other = picture.rotate(90)
    conversation = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "image", "image": other}]},
        {"role": "assistant", "content": "two pictures"},
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "and this?"}]},
    ]
    inputs = processor.encode_conversations(
        [processor.conversation(conversation), processor.conversation("how are you?")]
    )
    assert inputs["image_grid_thw"].shape == (3, 3)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, backbone(**inputs).logits)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4), backbone.generate(**inputs, max_new_tokens=4))


# Token embeddings.


@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings(make_model, backbone, inputs, tmp_path, tied):
    model = make_model()
    if not tied:
        model.vlm.config.tie_word_embeddings = False
        model.set_output_embeddings(torch.nn.Linear(32, backbone.config.text_config.vocab_size, bias=False))
        model.get_output_embeddings().load_state_dict({"weight": backbone.get_input_embeddings().weight})
    vocabulary = model.config.text_config.vocab_size
    painted = velocity(model, inputs)
    with torch.no_grad():
        spoken = model(**inputs).logits

    resized = model.resize_token_embeddings(vocabulary + 10)
    assert resized is model.get_input_embeddings() and resized.weight.shape == (vocabulary + 10, 32)
    assert model.config.text_config.vocab_size == model.vlm.config.text_config.vocab_size == vocabulary + 10
    assert (model.get_output_embeddings().weight is resized.weight) is tied
    model.save_pretrained(tmp_path)
    for speaker in (model, LatteFlowForConditionalGeneration.from_pretrained(tmp_path)):
        assert (speaker.get_output_embeddings().weight is speaker.get_input_embeddings().weight) is tied
        assert same_bytes(speaker, model)
        with torch.no_grad():
            logits = speaker(**inputs).logits
        assert logits.shape[-1] == vocabulary + 10
        torch.testing.assert_close(logits[..., :vocabulary], spoken, rtol=1e-5, atol=1e-5)
        assert torch.equal(velocity(speaker, inputs), painted)
        new = speaker.generate(input_ids=inputs["input_ids"][:1, -4:] * 0 + vocabulary + 9, max_new_tokens=2)
        assert new.shape[1] > 4

    model.resize_token_embeddings(vocabulary)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, spoken)


# Generation.


class Recorder(BaseStreamer):
    def __init__(self):
        self.tokens: list[int] = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.tokens.append(-1)


class StopAt(StoppingCriteria):
    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


class Only(LogitsProcessor):
    """Every token but one is forbidden."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores):
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, self.token] = 0
        return allowed


WAYS = {
    "without cache": {"use_cache": False},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "several samples": {"do_sample": True, "num_return_sequences": 3, "top_k": 20, "temperature": 0.7},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "static cache": {"cache_implementation": "static"},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("with_picture", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_generating_is_the_backbone_s(model, backbone, encode, picture, way, with_picture):
    asked = QUESTIONS[:1] if way == "prompt lookup" else QUESTIONS
    inputs = encode(*asked, image=picture if with_picture else None)
    found = []
    for speaker in (model, backbone):
        torch.manual_seed(0)
        found.append(speaker.generate(**inputs, max_new_tokens=6, min_new_tokens=6, **WAYS[way]))
    assert found[0].shape[1] == inputs["input_ids"].shape[1] + 6
    assert torch.equal(*found)


@pytest.mark.parametrize("with_picture", [False, True])
def test_cache_changes_no_token(model, encode, picture, with_picture):
    inputs = encode(*QUESTIONS, image=picture if with_picture else None)
    # Without a cache an image token among the answer's would ask for a picture that is not there.
    how = {"max_new_tokens": 8, "suppress_tokens": [model.config.vlm_config.image_token_id]}
    found = [model.generate(**inputs, **how, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*found)


def test_batch_of_questions_is_answered_as_each_alone(model, encode, picture):
    batch = encode(*QUESTIONS, image=picture)
    together = model.generate(**batch, max_new_tokens=6, min_new_tokens=6)[:, batch["input_ids"].shape[1] :]
    for row, question in enumerate(QUESTIONS):
        one = encode(question, image=picture)
        alone = model.generate(**one, max_new_tokens=6, min_new_tokens=6)[:, one["input_ids"].shape[1] :]
        assert torch.equal(together[row : row + 1], alone)


@pytest.mark.parametrize("kind", ["a stock backbone", "one of our models"])
def test_assisted_generation_changes_no_token(model, encode, kind):
    inputs = encode(QUESTIONS[0])
    config = copy.deepcopy(model.config.vlm_config)
    config.text_config.num_hidden_layers = 2
    torch.manual_seed(0)
    assistant = Qwen2VLForConditionalGeneration(config).eval()
    assistant.generation_config = copy.deepcopy(model.generation_config)
    if kind == "one of our models":
        assistant = LatteFlowForConditionalGeneration.from_vlm(assistant, num_experts=2, latent_channels=4).eval()
    proposed = []
    hook = assistant.get_decoder().register_forward_hook(lambda *_: proposed.append(1))
    found = model.generate(**inputs, max_new_tokens=8, assistant_model=assistant)
    hook.remove()
    assert proposed
    assert torch.equal(found, model.generate(**inputs, max_new_tokens=8))


def test_generation_from_embeddings(model, backbone, inputs):
    given = {
        "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]),
        "attention_mask": inputs["attention_mask"],
        "max_new_tokens": 5,
        "min_new_tokens": 5,
    }
    found = model.generate(**given)
    # Nothing but what is new: there are no tokens to repeat.
    assert found.shape == (2, 5)
    assert torch.equal(found, backbone.generate(**given))
    assert torch.equal(found, model.generate(**inputs, max_new_tokens=5, min_new_tokens=5)[:, -5:])


def test_streamer_gets_every_token(model, encode):
    inputs, streamer = encode(QUESTIONS[0]), Recorder()
    found = model.generate(**inputs, max_new_tokens=5, streamer=streamer)
    assert streamer.tokens == [*found[0].tolist(), -1]


def test_criteria_and_processors_are_heard(model, inputs, processor):
    length, token = inputs["input_ids"].shape[1], processor.tokenizer.convert_tokens_to_ids("a")
    stopped = model.generate(
        **inputs, max_new_tokens=9, min_new_tokens=9, stopping_criteria=StoppingCriteriaList([StopAt(length + 3)])
    )
    assert stopped.shape[1] == length + 3
    forced = model.generate(**inputs, max_new_tokens=4, logits_processor=LogitsProcessorList([Only(token)]))
    assert (forced[:, length:] == token).all() and forced.shape[1] == length + 4
    allowed = model.generate(**inputs, max_new_tokens=4, prefix_allowed_tokens_fn=lambda batch, tokens: [token])
    assert torch.equal(allowed, forced)


@pytest.mark.parametrize("how", ["argument", "model's", "model's, with an argument on top"])
def test_generation_config_is_honoured(make_model, inputs, how):
    model, length = make_model(), inputs["input_ids"].shape[1]
    config = GenerationConfig(
        max_new_tokens=3, min_new_tokens=3, num_beams=2, return_dict_in_generate=True, output_scores=True
    )
    asked = {"generation_config": config}
    if how != "argument":
        config.eos_token_id, config.pad_token_id = model.generation_config.eos_token_id, 0
        model.generation_config, asked = config, {}
    new = 3
    if "on top" in how:
        asked, new = {"max_new_tokens": 5, "min_new_tokens": 5}, 5
    before = config.to_dict()
    found = model.generate(**inputs, **asked)
    assert found.sequences.shape == (2, length + new)
    assert len(found.scores) == new and found.scores[0].shape[0] == 4 and found.beam_indices is not None
    assert config.to_dict() == before


def test_generation_tells_what_is_asked(make_model, inputs):
    model = make_model()
    model.set_attn_implementation("eager")
    found = model.generate(
        **inputs,
        max_new_tokens=3,
        min_new_tokens=3,
        return_dict_in_generate=True,
        output_logits=True,
        output_attentions=True,
        output_hidden_states=True,
    )
    length = inputs["input_ids"].shape[1]
    assert len(found.logits) == len(found.attentions) == len(found.hidden_states) == 3
    assert found.attentions[0][0].shape == (2, 4, length, length)
    assert [tuple(step[-1].shape) for step in found.hidden_states] == [(2, length, 32), (2, 1, 32), (2, 1, 32)]
    assert found.past_key_values.get_seq_length() == length + 2


def test_painting_between_two_turns_leaves_the_conversation_alone(model, encode, picture):
    # The backbone keeps the last prefill's rotary offset on itself: a painting between two calls writes over it.
    asked, prompt = encode(QUESTIONS[0], image=picture), encode("a red circle above a blue square")
    expected = model.generate(**asked, max_new_tokens=6)
    velocity(model, prompt)
    assert torch.equal(model.generate(**asked, max_new_tokens=6), expected)
    painted = velocity(model, asked)
    model.generate(**prompt, max_new_tokens=2)
    assert torch.equal(velocity(model, asked), painted)


# Gradients.


def test_hidden_states_and_attentions_keep_their_gradients(make_model, seen):
    model = make_model()
    model.vlm.requires_grad_(True)
    model.set_attn_implementation("eager")
    outputs = model(**seen, output_attentions=True, output_hidden_states=True)
    kept = [outputs.hidden_states[0], outputs.hidden_states[2], outputs.attentions[0], outputs.attentions[-1]]
    for tensor in kept:
        tensor.retain_grad()
    outputs.logits.flatten()[-1].backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in kept)


def test_velocity_is_differentiable_in_its_latents(model, inputs):
    context, latents = model.encode_context(**inputs), noise(2, 4, 4, 4).requires_grad_()
    assert not any(tensor.requires_grad for tensor in (*context.keys, *context.values))
    model.predict_velocity(latents, 730.0, context).square().sum().backward()
    assert latents.grad.abs().min() > 0
    model.zero_grad()


def test_labels_teach_an_unfrozen_backbone(make_model, seen):
    model = make_model().train()
    model.vlm.requires_grad_(True)
    model(**seen, labels=seen["input_ids"], latents=noise(2, 4, 4, 4)).loss.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # Softmax does not see what a key's bias adds to all scores of a query; rotary positions only bend that.
    assert [name for name in idle if not name.endswith("k_proj.bias")] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast(make_model, seen, dtype):
    losses, gradients = [], []
    for enabled in (False, True):
        model = make_model().train()
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            loss = model(
                **seen,
                latents=noise(2, 4, 4, 4),
                noise=noise(2, 4, 4, 4, seed=1),
                generator=torch.Generator().manual_seed(0),
            ).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.tower.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.95


@pytest.mark.parametrize(("vlm", "tower"), [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_training_takes_latents_as_the_autoencoder_gives_them(make_model, seen, vlm, tower):
    # In float32, whatever the model's dtype is; a frozen backbone may be narrower than the tower that learns.
    model = make_model().train()
    model.vlm.to(vlm)
    model.tower.to(tower)
    losses = []
    for dtype in (torch.float32, tower):
        data, start = noise(2, 4, 4, 4).to(dtype), noise(2, 4, 4, 4, seed=1).to(dtype)
        losses.append(model(**seen, latents=data, noise=start, generator=torch.Generator().manual_seed(0)).loss)
    losses[0].backward()
    assert {p.grad.dtype for p in model.tower.parameters()} == {tower}
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=0.02)
    context = model.encode_context(**seen)
    assert model.predict_velocity(noise(2, 4, 4, 4), 730.0, context).dtype == tower


def test_checkpointing_is_switched_on_and_off(make_model, inputs):
    model = make_model().train()
    with torch.no_grad():
        expected = velocity(model, inputs), model(**inputs).logits
    assert model.supports_gradient_checkpointing and not model.is_activation_checkpointing
    for switch, on in ((model.activation_checkpointing_enable, True), (model.activation_checkpointing_disable, False)):
        switch()
        assert model.is_activation_checkpointing is on
        assert all(layer.gradient_checkpointing is on for layer in model.tower.layers)
        with torch.no_grad():
            assert torch.equal(velocity(model, inputs), expected[0])
            assert torch.equal(model(**inputs).logits, expected[1])


def test_training_step_is_the_same_twice(make_model, inputs):
    model, asked = make_model(), {**inputs, "latents": noise(2, 4, 4, 4)}
    losses = []
    for training in (True, True, False):
        model.train(training)
        losses.append(model(**asked, generator=torch.Generator().manual_seed(0)).loss)
    # No drop-out: training differs from evaluation in nothing.
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])
    assert not torch.equal(losses[0], model(**asked, generator=torch.Generator().manual_seed(1)).loss)


def test_distributed_training_finds_no_unused_parameter(make_model, inputs, tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = make_model(residual_attention="scores", num_experts=2).train()
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(3):  # the second step fails if the first left a parameter without its gradient
            wrapped(**inputs, latents=noise(2, 4, 4, 4)).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(p.grad is not None for p in model.tower.parameters())


# Saving and loading.


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_saved_and_loaded_as_it_is(make_model, seen, tmp_path, dtype):
    model = make_model().to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    painted = []
    for asked in ({}, {"dtype": "auto"}, {"dtype": dtype}):
        loaded = LatteFlowForConditionalGeneration.from_pretrained(tmp_path, **asked)
        assert loaded.dtype == dtype and loaded.vlm.dtype == dtype and same_bytes(loaded, model)
        painted.append(velocity(loaded, seen))
    assert torch.equal(painted[0], painted[1]) and torch.equal(painted[0], painted[2])
    wide = LatteFlowForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_half_precision_speaks_as_the_backbone_and_paints_nearly_the_same(make_model, model, backbone, seen, dtype):
    half, stock = make_model().to(dtype), copy.deepcopy(backbone).to(dtype)
    with torch.no_grad():
        assert torch.equal(half(**seen).logits, stock(**seen).logits)
    assert torch.equal(half.generate(**seen, max_new_tokens=4), stock.generate(**seen, max_new_tokens=4))
    for timestep in TIMESTEPS:
        found, expected = velocity(half, seen, timestep), velocity(model, seen, timestep)
        assert found.dtype == dtype and torch.isfinite(found).all()
        error = (found.float() - expected).square().mean() / expected.square().mean()
        assert error.sqrt() < (0.02 if dtype == torch.float16 else 0.1)


def test_mismatched_sizes_are_refused_or_begun_anew(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"another shape.*tower.head.proj.weight.*ignore_mismatched_sizes"):
        LatteFlowForConditionalGeneration.from_pretrained(tmp_path, latent_channels=8)
    loaded, report = LatteFlowForConditionalGeneration.from_pretrained(
        tmp_path, latent_channels=8, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {name for name, *_ in report["mismatched_keys"]} == {
        "tower.latent_embedding.proj.weight",
        "tower.head.proj.weight",
        "tower.head.proj.bias",
    }
    assert (loaded.tower.head.proj.weight == 0).all() and loaded.tower.latent_embedding.proj.weight.std() > 0.01
    assert same_bytes(loaded.vlm, model.vlm) and same_bytes(loaded.tower.layers, model.tower.layers)


def test_checkpoint_of_another_kind_is_refused(backbone, tmp_path):
    # Read as ours, its configuration would be lost and defaults taken: a backbone of 72 billion parameters.
    backbone.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"qwen2_vl.*from_vlm"):
        LatteFlowConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"qwen2_vl.*from_vlm"):
        LatteFlowForConditionalGeneration.from_pretrained(tmp_path)


# What cannot be right.


def test_nothing_to_learn_from_is_refused(model, inputs):
    empty = model.encode_context(**inputs).select(torch.tensor([], dtype=torch.long))
    with pytest.raises(ValueError, match=r"latents must .*got \(0, 4, 4, 4\)"):
        model(latents=noise(0, 4, 4, 4), context=empty)
    with pytest.raises(ValueError, match=r"latents must .*got \(0, 4, 4, 4\)"):
        model.predict_velocity(noise(0, 4, 4, 4), 730.0, empty)
    with pytest.raises(ValueError, match=r"latents must .*got \(2, 4, 4, 0\)"):
        model.predict_velocity(noise(2, 4, 4, 0), 730.0, model.encode_context(**inputs))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input_ids": None}, r"input_ids must be the tokens of the prompts, \(batch, length\), got None"),
        ({"input_ids": torch.tensor([1, 2])}, r"input_ids must be .*got \(2,\)"),
        ({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, r"input_ids must be .*got \(0, 4\)"),
        ({"attention_mask": torch.ones(2, 3)}, r"attention_mask must have the shape of input_ids.*got \(2, 3\)"),
        ({"mm_token_type_ids": None}, "mm_token_type_ids must be given with images"),
        ({"position_ids": torch.zeros(3, 2, 1)}, "position_ids must not be given"),
        ({"past_key_values": DynamicCache()}, "past_key_values must not be given"),
        ({"inputs_embeds": torch.zeros(2, 1, 32)}, "inputs_embeds must not be given"),
    ],
)
def test_prompt_that_cannot_be_encoded_is_refused(model, seen, changed, message):
    given = {**seen, **changed}
    with pytest.raises(ValueError, match=message):
        model(**given, latents=noise(2, 4, 4, 4))
    with pytest.raises(ValueError, match=message):
        model.encode_context(given.pop("input_ids"), **given)


def test_training_loop_may_want_no_cache(model, seen):
    asked = {**seen, "latents": noise(2, 4, 4, 4), "labels": seen["input_ids"]}
    losses = [
        model(**asked, **how, generator=torch.Generator().manual_seed(0)).loss
        for how in ({}, {"use_cache": False, "position_ids": None, "past_key_values": None})
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (4, 4, 4), (3, 4, 4, 4)])
def test_noise_of_another_shape_is_refused(model, inputs, shape):
    with pytest.raises(ValueError, match="noise must have the shape"):
        model(**inputs, latents=noise(2, 4, 4, 4), noise=noise(*shape))
