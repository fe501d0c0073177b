"""Train a UNet from scratch to make images like those of a folder, with a training step and a loop of your own.

    python examples/unconditional/train_ddpm.py
    python examples/unconditional/train_ddpm.py --draws host --num_epochs 20 --output_dir runs/ddpm-host

About half a minute an epoch on two cores. Every field of `TrainingConfig` is a flag. What training does is written out
here, as in mindone's tutorial; `ms-diffsynth train` has a loop that does it for you. See docs/how_to/unconditional.md.
"""
from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass, fields
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.dataset import GeneratorDataset, transforms, vision
from PIL import Image
from tqdm.auto import tqdm

from ms_diffsynth import (
    Accelerator,
    AdamW,
    Draws,
    LearningRate,
    NoiseSchedule,
    StaticLossScaler,
    TrainStep,
    UnconditionalImagePipeline,
    UnifiedDataset,
)
from ms_diffsynth.data.images import grid
from ms_diffsynth.pipelines.shared.quiet import quiet_imports

logger = logging.getLogger("train_ddpm")


@dataclass
class TrainingConfig:
    dataset_name: str = "examples/data/smileys64"  # a folder of images, or a data set of the Hugging Face Hub
    image_size: int = 32  # of the generated images, pixels
    train_batch_size: int = 16
    eval_batch_size: int = 16  # how many images to sample during evaluation
    num_epochs: int = 30
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    lr_warmup_steps: int = 50
    save_image_epochs: int = 10
    save_model_epochs: int = 30
    num_inference_steps: int = 50  # of the sampled images
    draws: str = "in_step"  # or "host": where noise and timesteps come from
    mode: str = "graph"  # or "pynative"
    output_dir: str = "runs/ddpm-smileys"
    seed: int = 0


# -- data ------------------------------------------------------------------------------------------------------------


def load_images(name: str) -> list[Image.Image]:
    """The images of a folder, or of the column "image" of a data set of the Hub."""
    if Path(name).is_dir():
        metadata = next((str(p) for p in Path(name).glob("metadata.*")), None)
        dataset = UnifiedDataset(name, metadata, captions=False, required=(), data_file_keys="image",
                                 main_data_operator=UnifiedDataset.default_image_operator(name))
        return [row["image"] for row in dataset]
    try:
        from datasets import load_dataset
    except ImportError:
        raise SystemExit(f"dataset_name={name} is not a folder, and the package that loads data sets of the Hub is not "
                         "installed: pip install datasets, or name a folder of images.") from None
    return [row["image"].convert("RGB") for row in load_dataset(name, split="train")]


class ImageSource:
    """Images as GeneratorDataset takes them: uint8 [H, W, 3]."""

    def __init__(self, images: list[Image.Image]):
        self.images = images

    def __getitem__(self, index: int) -> np.ndarray:
        return np.asarray(self.images[int(index)])

    def __len__(self) -> int:
        return len(self.images)


def make_dataloader(config: TrainingConfig, images: list[Image.Image], accelerator: Accelerator):
    """Batches ``[images]``: float32 [B, 3, image_size, image_size] in [-1, 1]. A last, smaller batch is left out.

    Started by msrun or ms-diffsynth launch, each process gets its share of the images.
    """
    ms.dataset.config.set_seed(config.seed)
    preprocess = transforms.Compose([
        vision.Resize(config.image_size),
        vision.CenterCrop(config.image_size),
        vision.RandomHorizontalFlip(),
        vision.ToTensor(),
        vision.Normalize([0.5] * 3, [0.5] * 3, is_hwc=False),
    ])
    dataset = GeneratorDataset(ImageSource(images), column_names=["images"], shuffle=True, num_parallel_workers=1,
                               num_shards=accelerator.num_processes, shard_id=accelerator.process_index)
    dataset = dataset.map(preprocess, ["images"], num_parallel_workers=1)
    return dataset.batch(config.train_batch_size, drop_remainder=True)


# -- model and schedule ----------------------------------------------------------------------------------------------


def make_model(config: TrainingConfig) -> nn.Cell:
    """The network. An import of mindone comes after `Accelerator`, which fits mindone to the device."""
    with quiet_imports():
        from mindone.diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=config.image_size,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 64, 64),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )


def make_scheduler():
    """The noise schedule: 1000 timesteps, linear betas."""
    with quiet_imports():
        from mindone.diffusers import DDPMScheduler

    return DDPMScheduler(num_train_timesteps=1000)


# -- the training step -----------------------------------------------------------------------------------------------


class MyTrainStep(TrainStep):
    """The network predicts the noise in a noisy image. Noise and timesteps are drawn inside the step."""

    def __init__(self, model: nn.Cell, optimizer: nn.Cell, noise_scheduler, gradient_accumulation_steps: int,
                 length_of_dataloader: int):
        super().__init__(
            model,
            optimizer,
            StaticLossScaler(65536),
            1.0,
            gradient_accumulation_steps,
            gradient_accumulation_kwargs={"length_of_dataloader": length_of_dataloader},
        )
        self.noise_scheduler = noise_scheduler
        self.num_train_timesteps = noise_scheduler.config.num_train_timesteps
        self.say_where_noise_comes_from()

    def say_where_noise_comes_from(self) -> None:
        logger.warning("noise and timesteps are drawn inside the step: a resumed run draws others, and so do graph and "
                       "pynative mode. Exact resumption does not cover this step; --draws host does.")

    def forward(self, clean_images):
        noise = ops.randn(clean_images.shape)
        timesteps = ops.randint(0, self.num_train_timesteps, (clean_images.shape[0],))
        return self.denoising_loss(clean_images, noise, timesteps)

    def denoising_loss(self, clean_images, noise, timesteps):
        # the forward diffusion process: as much noise as there is at each timestep
        noisy_images = self.noise_scheduler.add_noise(clean_images, noise, timesteps)
        noise_pred = self.model(noisy_images, timesteps, return_dict=False)[0]
        loss = ops.mse_loss(noise_pred, noise)
        return self.scale_loss(loss), noise_pred


class HostDrawsTrainStep(MyTrainStep):
    """The same, with noise and timesteps drawn on the host: by seed and running number of the sample."""

    def __init__(self, *args, seed: int, accelerator: Accelerator):
        super().__init__(*args)
        self.generator, self.accelerator = Draws(seed), accelerator
        self.samples_seen = 0  # by all processes

    def say_where_noise_comes_from(self) -> None:
        pass

    def draws(self, clean_images):
        size = clean_images.shape[0]
        samples = self.samples_seen + self.accelerator.process_index * size + np.arange(size)
        self.samples_seen += size * self.accelerator.num_processes
        noise = self.generator.normal("noise", samples, clean_images.shape[1:])
        timesteps = self.generator.uniform("timestep", samples) * self.num_train_timesteps
        return Tensor(noise), Tensor(timesteps.astype(np.int32))

    def forward(self, clean_images, noise, timesteps):
        return self.denoising_loss(clean_images, noise, timesteps)


# -- the loop --------------------------------------------------------------------------------------------------------


def evaluate(config: TrainingConfig, epoch: int, pipeline: UnconditionalImagePipeline) -> None:
    """Sample from the same noise every time, and save the images as a grid."""
    images = pipeline(batch_size=config.eval_batch_size, seed=config.seed,
                      num_inference_steps=config.num_inference_steps)
    folder = Path(config.output_dir) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    grid(images, columns=4).save(folder / f"{epoch:04d}.png")


def train_loop(config: TrainingConfig, train_step: TrainStep, optimizer: AdamW, rate: LearningRate, dataloader,
               pipeline: UnconditionalImagePipeline, accelerator: Accelerator) -> list[float]:
    """Train, and every few epochs sample and save; returns the loss of every batch."""
    losses, updates = [], 0
    for epoch in range(config.num_epochs):
        progress = tqdm(dataloader.create_tuple_iterator(num_epochs=1), total=len(dataloader), desc=f"epoch {epoch}",
                        disable=not accelerator.is_main_process)
        for batch in progress:
            optimizer.set_learning_rate(rate(updates))
            result = train_step.step(*batch)
            updates += result.is_update
            losses.append(float(result.loss.asnumpy()))
            progress.set_postfix(loss=losses[-1], lr=rate(updates), step=updates)
        if not accelerator.is_main_process:
            continue
        is_last = epoch == config.num_epochs - 1
        if (epoch + 1) % config.save_image_epochs == 0 or is_last:
            evaluate(config, epoch, pipeline)
        if (epoch + 1) % config.save_model_epochs == 0 or is_last:
            pipeline.save_pretrained(Path(config.output_dir) / "model", replace=True)
    return losses


def main(config: TrainingConfig) -> list[float]:
    """Everything, in the order of the tutorial."""
    accelerator = Accelerator(config.gradient_accumulation_steps, config.mode)
    ms.set_seed(config.seed + accelerator.process_index)  # every process draws noise of its own
    dataloader = make_dataloader(config, load_images(config.dataset_name), accelerator)
    model, noise_scheduler = make_model(config), make_scheduler()
    batches = len(dataloader)
    steps = -(-batches // config.gradient_accumulation_steps) * config.num_epochs
    rate = LearningRate(schedule="cosine", base=config.learning_rate, warmup_steps=config.lr_warmup_steps,
                        total_steps=steps)
    optimizer = AdamW(model.trainable_params(), learning_rate=config.learning_rate)
    arguments = (model, optimizer, noise_scheduler, config.gradient_accumulation_steps, batches)
    if config.draws == "host":
        train_step = HostDrawsTrainStep(*arguments, seed=config.seed, accelerator=accelerator)
    else:
        train_step = MyTrainStep(*arguments)
    pipeline = UnconditionalImagePipeline({"unet": model}, noise_schedule=NoiseSchedule())
    return train_loop(config, train_step, optimizer, rate, dataloader, pipeline, accelerator)


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    parser = argparse.ArgumentParser(description="Train a UNet to make images like those of a folder.")
    for setting in fields(TrainingConfig):
        parser.add_argument(f"--{setting.name}", type=type(setting.default), default=setting.default)
    main(TrainingConfig(**vars(parser.parse_args())))
