# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The parts of a pipeline that can be on different devices: the backbone, each expert, the autoencoder.

An image passes each expert once, for all steps of its interval. With it travel the keys and values of that expert's
layers, and nothing of the other layers.
"""

import dataclasses
import threading
from concurrent.futures import Future
from typing import Any

import torch
from transformers.utils import logging

from .expert_batches import ExpertBatches
from .running_image import RunningImage


logger = logging.get_logger(__name__)


def keep_backbone(pipe: Any, device: torch.device | str) -> None:
    """Leave what encodes prompts and images and chats, and move it to a device. All else keeps its shape, without
    memory."""
    pipe.model.tower.to("meta")
    pipe.model.vlm.to(device)
    for name, part in pipe.vae.named_children():
        part.to("meta" if name == "decoder" else device)


def keep_expert(pipe: Any, expert: int, device: torch.device | str) -> None:
    """Leave one expert and what all experts share, enough for `predict_velocity`."""
    model = pipe.model
    pipe.vae.to("meta")
    model.vlm.to("meta")
    for name, part in model.tower.named_children():
        if name != "layers":
            part.to(device)
    for index, layer in enumerate(model.tower.layers):
        layer.to(device if index in model.expert_layers(expert) else "meta")


def keep_decoder(pipe: Any, device: torch.device | str) -> None:
    """Leave the autoencoder."""
    pipe.model.to("meta")
    pipe.vae.to(device)


def for_expert(image: RunningImage, config: Any) -> RunningImage:
    """What of an image has to travel to its expert: its state, and the keys and values of the expert's layers."""
    layers = config.context_layers(image.expert)
    negative = image.negative_context
    assert image.context is not None
    return dataclasses.replace(
        image,
        context=image.context.of_layers(layers),
        negative_context=None if negative is None else negative.of_layers(layers),
        velocity=None,
        previous_latents=None,
    )


class ExpertStage:
    """Takes images through the interval of one expert, those that are there in one batch.

    Args:
        model ([`LatteFlowForConditionalGeneration`]): the model; only this expert is run.
        expert (`int`): the expert.
    """

    def __init__(self, model: Any, expert: int):
        self.expert = expert
        self.batches = ExpertBatches(model)
        self._futures: dict[RunningImage, Future] = {}
        self._arrived: list[tuple[RunningImage, Future]] = []
        self._wake = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, image: RunningImage) -> Future:
        """Let an image take all steps of this expert.

        Returns:
            `Future`: of the image at its next expert, or finished. Cancelling it drops the image.

        Raises:
            `ValueError`: if the next step of the image belongs to another expert.
        """
        if image.is_done or image.expert != self.expert:
            found = None if image.is_done else image.expert
            raise ValueError(f"image must be at expert {self.expert}, got one at {found}.")
        future: Future = Future()
        with self._wake:
            self._arrived.append((image, future))
            self._wake.notify()
        return future

    def close(self) -> None:
        """End after the images that are there."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._is_closing or self._arrived or len(self.batches))
                arrived, self._arrived = self._arrived, []
            self._futures.update(arrived)
            self.batches.add(image for image, _ in arrived)
            for image, future in list(self._futures.items()):
                if future.cancelled():
                    self._forget(image)
            batch = self.batches.choose()
            if not batch:
                if self._is_closing:
                    return
                continue
            try:
                errors = self.batches.step(batch)
            except Exception as error:
                logger.exception("A step failed.")
                errors = dict.fromkeys(batch, error)
            for image in batch:
                if image in errors:
                    future = self._forget(image)
                    if future.set_running_or_notify_cancel():
                        future.set_exception(errors[image])
                elif image.is_done or image.expert != self.expert:
                    future = self._forget(image)
                    if future.set_running_or_notify_cancel():
                        future.set_result(image)

    def _forget(self, image: RunningImage) -> Future:
        self.batches.remove([image])
        return self._futures.pop(image)
