"""Distillation on a small random pipeline: what the trajectories are, what is learned, and what is refused."""

import copy
import json

import pytest
import torch
import yaml
from typer.testing import CliRunner

from latte_flow_hf import LatteFlowForConditionalGeneration, LatteFlowPipeline, LatteFlowScheduler
from latte_flow_hf.cli import app
from latte_flow_hf.training.cache import hash_module, read_metadata
from latte_flow_hf.training.recipe import DistillationSettings, Recipe
from latte_flow_hf.training.train import train
from latte_flow_hf.training.trajectories import (
    check_earlier_student,
    check_teacher,
    generate_trajectories,
    student_new_noise,
    trajectory_sigmas,
)


PROMPTS = ["a red circle", "a blue square left of a green cross"]


@pytest.fixture
def distillation(recipe, tmp_path):
    """Makes the content of a recipe of two steps that distils the small pipeline; arguments change its sections."""

    def make(**changes) -> dict:
        content = recipe(training={"max_steps": 2, "save_steps": 2})
        content["data"] = {
            "source": {"path": "tinyworld", "num_images": 6},
            "size": 32,
            "cache": str(tmp_path / "trajectories"),
        }
        content["distillation"] = {"teacher_steps": [2, 2], "guidance_scale": 2.0, "batch_size": 4}
        for name, value in changes.items():
            content[name] = {**content.get(name, {}), **value} if isinstance(value, dict) else value
        return content

    return make


NO_NOISE = [0.0, 0.0]


@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_states_are_those_of_the_teachers_own_sampling(pipe, solver):
    settings = DistillationSettings(
        teacher_steps=[4, 2], steps_per_expert=[2, 1], guidance_scale=[3.0, 2.0], solver=solver
    )
    states = generate_trajectories(pipe, PROMPTS, [5, 6], 32, settings, NO_NOISE)
    assert states.shape == (2, 3, 2, 4, 4, 4) and states.dtype == torch.float32
    assert trajectory_sigmas(pipe.model.config.expert_boundaries, [2, 1]) == [1.0, 0.75, 0.5, 0.0]
    noise = torch.stack([torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)])
    assert torch.equal(states[:, 0, 0], noise)
    # Without new noise a step starts where the one before it ends.
    torch.testing.assert_close(states[:, 1:, 0], states[:, :-1, 1], atol=1e-5, rtol=1e-5)
    # The same path in one call, and its first half: 2 of 4 steps of expert 0, with Heun's correction at sigma 0.75.
    pipe.scheduler = LatteFlowScheduler(expert_boundaries=pipe.model.config.expert_boundaries, solver=solver)
    call = {"latents": noise, "height": 32, "width": 32, "guidance_scale": [3.0, 2.0], "output_type": "latent"}
    reached = []
    pipe(
        PROMPTS,
        steps_per_expert=[4, 2],
        callback_on_step_end=lambda p, i, t, tensors: reached.append(tensors["latents"]) or {},
        **call,
    )
    for step, evaluation in enumerate([3, 7, 10] if solver == "heun" else [1, 3, 5]):
        torch.testing.assert_close(states[:, step, 1], reached[evaluation], atol=1e-5, rtol=1e-5)


def test_new_noise_is_added_between_the_steps_of_the_student_by_its_own_formula(pipe):
    """A student that takes exactly the teacher's steps meets the teacher's states, with noise of the same seeds."""
    settings = DistillationSettings(
        teacher_steps=[2, 1], steps_per_expert=[2, 1], guidance_scale=3.0, solver="euler", new_noise=[0.5, 0.0]
    )
    states = generate_trajectories(pipe, PROMPTS, [5, 6], 32, settings, [0.5, 0.0])
    assert (states[:, 1:, 0] - states[:, :-1, 1]).abs().mean() > 0.1
    pipe.scheduler = LatteFlowScheduler(expert_boundaries=pipe.model.config.expert_boundaries, new_noise=[0.5, 0.0])
    reached = []
    pipe(
        PROMPTS,
        steps_per_expert=[2, 1],
        guidance_scale=3.0,
        height=32,
        width=32,
        output_type="latent",
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        callback_on_step_end=lambda p, i, t, tensors: reached.append(tensors["latents"]) or {},
    )
    torch.testing.assert_close(states[:, 1, 0], reached[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(states[:, 2, 0], reached[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(states[:, 2, 1], reached[2], atol=1e-4, rtol=1e-4)


def test_states_do_not_depend_on_the_scheduler_of_the_teacher(pipe):
    settings = DistillationSettings(teacher_steps=[1, 1], guidance_scale=1.0, solver="euler")
    plain = generate_trajectories(pipe, PROMPTS, [5, 6], 32, settings, NO_NOISE)
    noisy = LatteFlowScheduler(expert_boundaries=pipe.model.config.expert_boundaries, new_noise=0.5, shift=3.0)
    pipe.scheduler = noisy
    assert torch.equal(generate_trajectories(pipe, PROMPTS, [5, 6], 32, settings, NO_NOISE), plain)
    assert pipe.scheduler is noisy


def test_new_noise_is_that_of_the_scheduler_unless_it_is_given(own_pipe):
    boundaries = own_pipe.model.config.expert_boundaries
    own_pipe.scheduler = LatteFlowScheduler(expert_boundaries=boundaries, new_noise=[0.5, 0.0])
    assert student_new_noise(DistillationSettings(teacher_steps=[1, 1]), own_pipe) == [0.5, 0.0]
    for given, expected in ((0.25, [0.25, 0.25]), ([0.0, 0.75], [0.0, 0.75]), (0.0, [0.0, 0.0])):
        settings = DistillationSettings(teacher_steps=[1, 1], new_noise=given)
        assert student_new_noise(settings, own_pipe) == expected
    with pytest.raises(ValueError, match="new_noise must be one for each of 2 experts"):
        check_teacher(own_pipe, own_pipe, DistillationSettings(teacher_steps=[1, 1], new_noise=[0.5]))


@pytest.mark.parametrize("steps", [[1, 1], [3, 2]])
def test_a_teacher_of_the_same_steps_has_nothing_to_teach(pipe, steps):
    """One Euler step is `mean_velocity` of its own start: the loss of such a teacher is zero."""
    settings = DistillationSettings(teacher_steps=steps, steps_per_expert=steps, guidance_scale=1.0, solver="euler")
    prompts = PROMPTS * 8
    states = generate_trajectories(pipe, prompts, list(range(16)), 32, settings, NO_NOISE)
    context = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)[0]
    sigmas = trajectory_sigmas(pipe.model.config.expert_boundaries, steps)
    output = pipe.model(states=states, sigmas=sigmas, context=context)
    assert output.loss.item() < 1e-8 and output.expert_losses.shape == (2,)
    assert torch.equal(output.loss, output.flow_loss)
    other = pipe.model(states=states + torch.randn_like(states), sigmas=sigmas, context=context)
    assert (other.expert_losses > 1e-2).all()


def test_wrong_states_and_sigmas_are_refused(model, encode):
    states, prompts = torch.zeros(2, 2, 2, 4, 4, 4), encode(*PROMPTS)
    context = model.encode_context(**prompts)
    for sigmas in ([1.0, 0.6, 0.0], [0.0, 0.5, 1.0], None):
        with pytest.raises(ValueError, match="sigmas must fall from 1 to 0 and contain the boundaries"):
            model(states=states, sigmas=sigmas, context=context)
    with pytest.raises(ValueError, match="states must be"):
        model(states=states[:, :1], sigmas=[1.0, 0.5, 0.0], context=context)
    with pytest.raises(ValueError, match="states must be"):
        # The S + 1 states of a path, as an earlier version stored them.
        model(states=torch.zeros(2, 3, 4, 4, 4), sigmas=[1.0, 0.5, 0.0], context=context)
    with pytest.raises(ValueError, match="a prompt for each"):
        model(states=states.repeat(2, 1, 1, 1, 1, 1), sigmas=[1.0, 0.5, 0.0], context=context)


def test_a_distilled_pipeline_is_sampled_with_its_steps(distillation, run, pipeline, count_layers, tmp_path):
    before = LatteFlowPipeline.from_pretrained(pipeline)
    pipe = run(distillation(), tmp_path)
    assert hash_module(pipe.model.tower) != hash_module(before.model.tower)
    assert hash_module(pipe.model.vlm) == hash_module(before.model.vlm)
    expected = {"steps_per_expert": [1, 1], "guidance_scale": 1.0, "distilled_experts": [0, 1]}
    assert pipe.model.config.sampling == expected
    with count_layers(pipe.model) as calls:
        pipe("a red circle", output_type="latent")
    assert set(calls.values()) == {1} and pipe.num_timesteps == 2


def test_the_result_is_sampled_with_the_new_noise_it_was_trained_with(distillation, run, pipeline, tmp_path):
    full = run(distillation(distillation={"new_noise": [0.5, 0.0]}), tmp_path)
    assert full.model.config.sampling["new_noise"] == full.scheduler.config.new_noise == [0.5, 0.0]
    content = {**distillation(distillation={"new_noise": [0.5, 0.0]}), "lora": {"experts": [0, 1], "r": 2}}
    adapter = train(Recipe.from_dict(content), tmp_path / "lora", tmp_path / "adapter")
    pipe = LatteFlowPipeline.from_pretrained(pipeline)
    pipe.load_lora_weights(str(adapter))
    used = []
    pipe(
        "a red circle",
        output_type="latent",
        callback_on_step_end=lambda pipe, *_: used.append(pipe.scheduler.config.new_noise) or {},
    )
    assert used == [[0.5, 0.0]] * 2 and pipe.scheduler.config.new_noise == 0.0


def test_trajectories_are_resumed_and_shared_between_runs(distillation, tmp_path):
    content, folder = distillation(), tmp_path / "trajectories"
    train(Recipe.from_dict(content), tmp_path / "one", tmp_path / "full")
    shards = sorted(folder.glob("trajectories-*.safetensors"))
    assert [len(read_metadata(path)["prompts"]) for path in shards] == [4, 2]
    before = [path.read_bytes() for path in shards]
    shards[1].unlink()
    adapter = train(
        Recipe.from_dict({**content, "lora": {"experts": [0, 1], "r": 2}}), tmp_path / "two", tmp_path / "a"
    )
    assert [path.read_bytes() for path in shards] == before
    assert (adapter / "adapter_config.json").exists()
    shards[0].write_bytes(before[0][:-1] + bytes([before[0][-1] ^ 1]))
    with pytest.raises(OSError, match="damaged"):
        train(Recipe.from_dict(content), tmp_path / "three", tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"distillation": {"guidance_scale": 3.0}}, "guidance_scale"),
        ({"distillation": {"teacher_steps": [4, 2]}}, "teacher_steps"),
        ({"distillation": {"solver": "euler"}}, "solver"),
        ({"distillation": {"new_noise": 0.5}}, "new_noise"),
        ({"data": {"source": {"path": "tinyworld", "num_images": 7}}}, "prompts"),
        ({"seed": 1}, "seed"),
    ],
)
def test_trajectories_of_other_settings_are_refused(distillation, tmp_path, change, name):
    train(Recipe.from_dict(distillation()), tmp_path / "one", tmp_path / "full")
    with pytest.raises(ValueError, match=f"made with a different .*{name}"):
        train(Recipe.from_dict(distillation(**change)), tmp_path / "two", tmp_path / "other")


def test_trajectories_of_another_teacher_are_refused(distillation, own_pipe, tmp_path):
    train(Recipe.from_dict(distillation()), tmp_path / "one", tmp_path / "full")
    own_pipe.model.tower.head.proj.bias.data += 1
    own_pipe.save_pretrained(tmp_path / "teacher")
    content = distillation(distillation={"teacher": str(tmp_path / "teacher")})
    with pytest.raises(ValueError, match="made with a different teacher;"):
        train(Recipe.from_dict(content), tmp_path / "two", tmp_path / "other")
    with pytest.raises(ValueError, match="was distilled to few steps itself"):
        content = distillation(distillation={"teacher": str(tmp_path / "full")})
        train(Recipe.from_dict(content), tmp_path / "two", tmp_path / "other")


def test_trajectories_between_other_boundaries_are_refused(distillation, own_pipe, tmp_path):
    train(Recipe.from_dict(distillation()), tmp_path / "one", tmp_path / "full")
    own_pipe.model.config.expert_boundaries = [1.0, 0.6, 0.0]
    own_pipe.scheduler = LatteFlowScheduler(expert_boundaries=[1.0, 0.6, 0.0])
    own_pipe.save_pretrained(tmp_path / "other")
    content = distillation(model={"pipeline": str(tmp_path / "other")})
    with pytest.raises(ValueError, match=r"made with a different .*expert_boundaries"):
        train(Recipe.from_dict(content), tmp_path / "two", tmp_path / "result")


def test_a_teacher_that_does_not_fit_is_refused(own_pipe, make_model, make_vae):
    settings, student = DistillationSettings(teacher_steps=[2, 2]), own_pipe
    teacher = copy.copy(student)
    wider = copy.deepcopy(student.model.config)
    wider.text_config.hidden_size = wider.vlm_config.vision_config.hidden_size = 64
    wider.text_config.num_attention_heads = 8
    for model, name in (
        (make_model(num_experts=4), "num_experts 4"),
        (make_model(expert_boundaries=[1.0, 0.6, 0.0]), "expert_boundaries"),
        (make_model(latent_channels=8), "latent_channels 8"),
        (LatteFlowForConditionalGeneration(wider), "hidden_size 64"),
    ):
        teacher.register_modules(model=model)
        with pytest.raises(ValueError, match=f"teacher has {name}"):
            check_teacher(teacher, student, settings)
        teacher.register_modules(model=student.model)
    with pytest.raises(ValueError, match="teacher_steps must be one for each of 2 experts"):
        check_teacher(student, student, DistillationSettings(teacher_steps=[2, 2, 2]))
    other = LatteFlowPipeline(**{**student.components, "vae": copy.deepcopy(student.vae)})
    next(other.vae.parameters()).data += 1
    with pytest.raises(ValueError, match="another autoencoder"):
        check_teacher(other, student, settings)


def test_chosen_experts_are_distilled_and_the_others_keep_their_steps(distillation, run, tmp_path):
    pipe = run(distillation(trainable=[1]), tmp_path)
    assert pipe.model.config.sampling == {
        "steps_per_expert": [2, 1],
        "guidance_scale": [2.0, 1.0],
        "distilled_experts": [1],
    }
    pipe("a red circle", output_type="latent")
    assert pipe.num_timesteps == 3
    pipe("a red circle", output_type="latent", steps_per_expert=[5, 1])
    with pytest.raises(ValueError, match="expert 1 was distilled to"):
        pipe("a red circle", output_type="latent", steps_per_expert=[2, 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_dropout": 0.1}, "prompt_dropout"),
        ({"folded_guidance_scale": 4.0}, "folded_guidance_scale"),
        ({"trainable": "vlm"}, "trainable must be"),
        ({"distillation": {"steps_per_expert": [1, 3]}}, "multiples of steps_per_expert"),
        ({"distillation": {"solver": "multistep"}}, "solver"),
        ({"distillation": {"new_noise": 1.5}}, "new_noise must be from 0 to 1"),
        ({"distillation": {"new_noise": [0.5, -0.1]}}, "new_noise must be from 0 to 1"),
        ({"distillation": {"teacher_step": [1, 1]}}, "did you mean 'teacher_steps'"),
        ({"data": {"source": {"path": "tinyworld", "streaming": True}}}, "streaming"),
        ({"model": {"pipeline": None, "backbone": "a", "autoencoder": "b"}}, "starts from a trained model"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(distillation, change, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict(distillation(**change))


def test_the_command_distils_and_refuses_a_recipe_without_a_teacher(distillation, tmp_path):
    content = distillation()
    (tmp_path / "distill.yaml").write_text(yaml.safe_dump(content))
    arguments = ["--work-dir", str(tmp_path / "work"), "-o"]
    result = CliRunner().invoke(app, ["distill", str(tmp_path / "distill.yaml"), *arguments, str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "model" / "config.json").read_text())["sampling"]["guidance_scale"] == 1.0
    result = CliRunner().invoke(app, ["info", "--model", str(tmp_path / "out")])
    assert "steps per expert 1, 1 (euler); guidance 1; experts 0, 1 distilled" in result.stdout
    del content["distillation"]
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(content))
    result = CliRunner().invoke(app, ["distill", str(tmp_path / "train.yaml"), *arguments, str(tmp_path / "other")])
    assert result.exit_code == 1 and "has no section `distillation`" in result.stderr


def test_an_earlier_student_leads_to_the_starts_and_the_teacher_goes_on(pipe, own_pipe):
    """The starts are the path of the earlier student, and each end is the teacher's from that start."""
    boundaries = pipe.model.config.expert_boundaries
    own_pipe.model.config.sampling = {"steps_per_expert": [1, 1], "guidance_scale": 1.0, "distilled_experts": [0, 1]}
    own_pipe.model.tower.head.proj.bias.data += 0.5
    settings = DistillationSettings(teacher_steps=[2, 1], guidance_scale=3.0, solver="euler")
    states = generate_trajectories(pipe, PROMPTS, [5, 6], 32, settings, [0.5, 0.0], own_pipe)
    own_pipe.scheduler = LatteFlowScheduler(expert_boundaries=boundaries, new_noise=[0.5, 0.0])
    call = {"height": 32, "width": 32, "output_type": "latent"}
    reached = []
    own_pipe(
        PROMPTS,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        callback_on_step_end=lambda p, i, t, tensors: reached.append(tensors["latents"]) or {},
        **call,
    )
    torch.testing.assert_close(states[:, 1, 0], reached[0], atol=1e-4, rtol=1e-4)
    pipe.scheduler = LatteFlowScheduler(expert_boundaries=boundaries)
    end = pipe(PROMPTS, latents=states[:, 1, 0], sigmas=[0.5], guidance_scale=3.0, **call).images
    torch.testing.assert_close(states[:, 1, 1], end, atol=1e-4, rtol=1e-4)
    # The first step starts from noise in any case.
    plain = generate_trajectories(pipe, PROMPTS, [5, 6], 32, settings, [0.5, 0.0])
    assert torch.equal(states[:, 0], plain[:, 0]) and not torch.allclose(states[:, 1], plain[:, 1], atol=1e-2)


def test_a_student_is_distilled_again_from_where_it_ended(distillation, pipeline, tmp_path):
    lora = {"experts": [0, 1], "r": 2}
    first = train(Recipe.from_dict({**distillation(), "lora": lora}), tmp_path / "one", tmp_path / "first")
    again = distillation(data={"cache": str(tmp_path / "again")}, distillation={"student_lora": str(first)})
    again["lora"] = {**lora, "weights": str(first)}
    second = train(Recipe.from_dict(again), tmp_path / "two", tmp_path / "second")
    pipe = LatteFlowPipeline.from_pretrained(pipeline)
    pipe.load_lora_weights(str(second))
    assert pipe.model.sampling["steps_per_expert"] == [1, 1]
    # The trajectories depend on the earlier student.
    other = distillation(data={"cache": str(tmp_path / "again")})
    with pytest.raises(ValueError, match="made with a different earlier student"):
        train(Recipe.from_dict(other), tmp_path / "three", tmp_path / "third")


def test_an_earlier_student_of_other_steps_is_refused(own_pipe):
    settings = DistillationSettings(teacher_steps=[2, 2])
    with pytest.raises(ValueError, match="earlier student has steps_per_expert None"):
        check_earlier_student(own_pipe, own_pipe, settings)
    for sampling, name in (
        ({"steps_per_expert": [2, 1], "distilled_experts": [0, 1]}, r"steps_per_expert \[2, 1\]"),
        ({"steps_per_expert": [1, 1], "distilled_experts": [0]}, r"distilled_experts \[0\]"),
    ):
        own_pipe.model.config.sampling = sampling
        with pytest.raises(ValueError, match=f"earlier student has {name}"):
            check_earlier_student(own_pipe, own_pipe, settings)
