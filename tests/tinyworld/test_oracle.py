"""The oracle, which judges everything else, is right on images whose content is known."""

import numpy as np
import pytest
from PIL import Image

from latte_flow_hf.tinyworld.oracle import read_scene, shows
from latte_flow_hf.tinyworld.shapes import (
    RELATIONS,
    Scene,
    SceneObject,
    WiderObject,
    draw_scene,
    place_objects,
    sample_scene,
)


def test_the_oracle_is_right_on_at_least_99_5_percent_of_drawn_images():
    rng = np.random.default_rng(5)
    scenes = [sample_scene(rng, 1 + i % 2, held_out=i % 4 == 3) for i in range(1000)]
    right = [read_scene(draw_scene(scene, place_objects(scene, rng))) == scene.canonical for scene in scenes]
    assert np.mean(right) >= 0.995


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_oracle_distinguishes_similar_scenes(relation):
    rng = np.random.default_rng(6)
    scene = Scene((SceneObject("red", "circle"), SceneObject("blue", "square")), relation)
    image = draw_scene(scene, place_objects(scene, rng))
    converse = RELATIONS[relation][0]
    assert shows(image, f"a red circle {relation} a blue square")
    assert shows(image, f"a blue square {converse} a red circle")
    assert not shows(image, f"a red circle {converse} a blue square")
    assert not shows(image, f"a blue circle {relation} a red square")
    assert not shows(image, f"a red cross {relation} a blue square")
    assert not shows(image, "a red circle")


def test_the_oracle_sees_nothing_in_noise_and_in_an_empty_image():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert read_scene(Image.fromarray(noise)) is None
    assert read_scene(Image.new("RGB", (64, 64), (20, 20, 24))) is None


def test_the_oracle_refuses_another_size():
    with pytest.raises(ValueError, match=r"64x64, got \(32, 32\)"):
        read_scene(Image.new("RGB", (32, 32)))


def test_the_oracle_recognises_wider_objects():
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
