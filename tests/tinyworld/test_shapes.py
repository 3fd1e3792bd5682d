"""Scenes are valid, held-out pairs are never sampled, and drawings match their scenes."""

import numpy as np
import pytest

from latte_flow_hf.tinyworld.shapes import (
    ALL_OBJECTS,
    RELATIONS,
    Scene,
    SceneObject,
    WiderObject,
    draw_scene,
    place_objects,
    sample_scene,
)


def test_one_pair_in_eight_is_held_out_of_two_object_scenes():
    held_out = [item for item in ALL_OBJECTS if item.held_out]
    assert len(held_out) * 8 == len(ALL_OBJECTS)
    assert len({item.colour for item in held_out}) == len({item.shape for item in held_out}) == len(held_out)
    rng = np.random.default_rng(7)
    assert not any(item.held_out for _ in range(500) for item in sample_scene(rng, 2).objects)
    assert all(sample_scene(rng, 2, held_out=True).held_out for _ in range(100))
    assert not Scene((held_out[0],)).held_out


def test_drawings_stay_inside_and_two_objects_apart():
    rng = np.random.default_rng(8)
    for _ in range(300):
        scene = sample_scene(rng, 2)
        (x1, y1, s1), (x2, y2, s2) = place_objects(scene, rng)
        for x, y, size in ((x1, y1, s1), (x2, y2, s2)):
            assert min(x, y) - size >= 1 and max(x, y) + size <= 63
        dx, dy = RELATIONS[scene.relation][1]
        along = (x1 - x2) * dx + (y1 - y2) * dy
        assert along - s1 - s2 >= 4.99
        assert along > abs((x1 - x2) * dy + (y1 - y2) * dx)


def test_drawing_depends_on_the_generator_alone():
    scene = Scene((SceneObject("green", "cross"),))
    first, second, other = (draw_scene(scene, place_objects(scene, np.random.default_rng(s))) for s in (1, 1, 2))
    assert first.tobytes() == second.tobytes() != other.tobytes()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SceneObject("orange", "circle"), "colour must be one of .*got 'orange'"),
        (lambda: SceneObject("red", "star"), "shape must be one of .*got 'star'"),
        (lambda: Scene((SceneObject("red", "circle"),), "left of"), "relation goes with two objects"),
        (lambda: Scene((SceneObject("red", "circle"), SceneObject("red", "cross")), "near"), "got 'near'"),
        (lambda: Scene(()), "one or two objects, got 0"),
    ],
)
def test_invalid_scenes_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_wider_objects_do_not_change_the_embedded_world():
    new = Scene((WiderObject("orange", "star"), WiderObject("red", "circle")), "above")
    assert new.prompt == "an orange star above a red circle"
    assert len(ALL_OBJECTS) == 24 and not any(item.colour == "orange" or item.shape == "star" for item in ALL_OBJECTS)
    old = SceneObject("red", "circle")
    positions = [(30.0, 30.0, 12.0)]
    assert draw_scene(Scene((old,)), positions).tobytes() == draw_scene(Scene(new.objects[1:]), positions).tobytes()
