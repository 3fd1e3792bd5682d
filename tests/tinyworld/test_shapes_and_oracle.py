"""The oracle judges everything else, so here it is judged itself: on pictures whose meaning is known."""

import numpy as np
import pytest
from PIL import Image

from latte_flow_hf.tinyworld.oracle import read_scene, shows
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


def test_the_oracle_is_right_on_at_least_99_5_percent_of_drawn_pictures():
    rng = np.random.default_rng(5)
    scenes = [sample_scene(rng, 1 + i % 2, held_out=i % 4 == 3) for i in range(1000)]
    right = [read_scene(draw_scene(scene, place_objects(scene, rng))) == scene.canonical for scene in scenes]
    assert np.mean(right) >= 0.995


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_oracle_tells_a_scene_from_its_neighbours(relation):
    rng = np.random.default_rng(6)
    scene = Scene((SceneObject("red", "circle"), SceneObject("blue", "square")), relation)
    picture = draw_scene(scene, place_objects(scene, rng))
    converse = RELATIONS[relation][0]
    assert shows(picture, f"a red circle {relation} a blue square")
    assert shows(picture, f"a blue square {converse} a red circle")
    assert not shows(picture, f"a red circle {converse} a blue square")
    assert not shows(picture, f"a blue circle {relation} a red square")
    assert not shows(picture, f"a red cross {relation} a blue square")
    assert not shows(picture, "a red circle")


def test_the_oracle_sees_nothing_in_noise_and_in_an_empty_picture():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert read_scene(Image.fromarray(noise)) is None
    assert read_scene(Image.new("RGB", (64, 64), (20, 20, 24))) is None


def test_the_oracle_refuses_another_size():
    with pytest.raises(ValueError, match=r"64x64, got \(32, 32\)"):
        read_scene(Image.new("RGB", (32, 32)))


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
def test_what_is_not_in_the_world_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_the_oracle_reads_the_wider_world_as_well():
    rng = np.random.default_rng(8)
    everything = [WiderObject(colour, shape) for colour in WiderObject.colours for shape in WiderObject.shapes]
    right = []
    for index in range(1000):
        first, second = rng.choice(len(everything), size=2, replace=False)
        scene = Scene((everything[first],))
        if index % 2:
            scene = Scene((everything[first], everything[second]), list(RELATIONS)[index // 2 % 4])
        right.append(read_scene(draw_scene(scene, place_objects(scene, rng)), WiderObject) == scene.canonical)
    assert np.mean(right) >= 0.995


def test_the_wider_world_leaves_the_embedded_one_alone():
    new = Scene((WiderObject("orange", "star"), WiderObject("red", "circle")), "above")
    assert new.prompt == "an orange star above a red circle"
    assert len(ALL_OBJECTS) == 24 and not any(item.colour == "orange" or item.shape == "star" for item in ALL_OBJECTS)
    old = SceneObject("red", "circle")
    places = [(30.0, 30.0, 12.0)]
    assert draw_scene(Scene((old,)), places).tobytes() == draw_scene(Scene(new.objects[1:]), places).tobytes()
