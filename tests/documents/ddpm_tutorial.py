"""Document 004, mindone's "Train a diffusion model", cell after cell (mindone and Hugging Face, Apache License 2.0).

As it stands there, but for the import of `TrainStep` and the tutorial's own errors, which docs/how_to/unconditional.md
lists; each such line says so. In place of the butterflies is a folder of images, `data`. Cells that only show something
(`matplotlib`) are left out. The test makes the sizes smaller.
"""
# ruff: noqa: B007, C408, E402, RUF059  (the tutorial's own lines)
import ms_diffsynth  # isort: skip  # noqa: F401  new: before the first import from mindone

# -- Training configuration
from dataclasses import dataclass


@dataclass
class TrainingConfig:
    image_size = 128  # the generated image resolution
    train_batch_size = 16
    eval_batch_size = 16  # how many images to sample during evaluation
    num_epochs = 50
    gradient_accumulation_steps = 1
    learning_rate = 1e-4
    lr_warmup_steps = 500
    save_image_epochs = 10
    save_model_epochs = 30
    mixed_precision = "fp16"  # `no` for float32, `fp16` for automatic mixed precision
    output_dir = "ddpm-butterflies-128"  # the model name locally and on the HF Hub

    push_to_hub = True  # whether to upload the saved model to the HF Hub
    hub_model_id = "<your-username>/<my-awesome-model>"  # the name of the repository to create on the HF Hub
    hub_private_repo = False
    overwrite_output_dir = True  # overwrite the old model when re-running the notebook
    seed = 0


config = TrainingConfig()

# -- Load the dataset
from pathlib import Path

from PIL import Image


class Folder:
    """What the cells ask of `datasets.load_dataset("imagefolder", ...)`, which is not installed everywhere."""

    def __init__(self, path):
        self.images = [Image.open(file) for file in sorted(Path(path).glob("*.png"))]

    def set_transform(self, function):
        self.transform = function

    def __getitem__(self, index):
        return {key: values[0] for key, values in self.transform({"image": [self.images[index]]}).items()}

    def __len__(self):
        return len(self.images)


dataset = Folder("data")  # load_dataset(config.dataset_name, split="train")

from mindspore.dataset import transforms, vision

preprocess = transforms.Compose(
    [
        vision.Resize((config.image_size, config.image_size)),
        vision.RandomHorizontalFlip(),
        vision.ToTensor(),
        vision.Normalize([0.5], [0.5], is_hwc=False),
    ]
)


def transform(examples):
    images = [preprocess(image.convert("RGB"))[0] for image in examples["image"]]
    return {"images": images}


dataset.set_transform(transform)

import numpy as np  # the tutorial imports it further down
from mindspore.dataset import GeneratorDataset


class DatasetForMindData:
    def __init__(self, data):
        self.data = data

    def __getitem__(self, idx):
        idx = idx.item() if isinstance(idx, np.integer) else idx
        return np.array(self.data[idx]["images"], dtype=np.float32)

    def __len__(self):
        return len(self.data)


# the tutorial has batch_size=, which GeneratorDataset does not take
train_dataloader = GeneratorDataset(DatasetForMindData(dataset), column_names=["images"], shuffle=True)
train_dataloader = train_dataloader.batch(config.train_batch_size)

# -- Create a UNet2DModel
from mindone.diffusers import UNet2DModel

model = UNet2DModel(
    sample_size=config.image_size,  # the target image resolution
    in_channels=3,  # the number of input channels, 3 for RGB images
    out_channels=3,  # the number of output channels
    layers_per_block=2,  # how many ResNet layers to use per UNet block
    block_out_channels=(128, 128, 256, 256, 512, 512),  # the number of output channels for each UNet block
    down_block_types=(
        "DownBlock2D",  # a regular ResNet downsampling block
        "DownBlock2D",
        "DownBlock2D",
        "DownBlock2D",
        "AttnDownBlock2D",  # a ResNet downsampling block with spatial self-attention
        "DownBlock2D",
    ),
    up_block_types=(
        "UpBlock2D",  # a regular ResNet upsampling block
        "AttnUpBlock2D",  # a ResNet upsampling block with spatial self-attention
        "UpBlock2D",
        "UpBlock2D",
        "UpBlock2D",
        "UpBlock2D",
    ),
)

import mindspore  # the tutorial imports it further down

sample_image = mindspore.Tensor(dataset[0]["images"]).unsqueeze(0)  # in the tutorial unsqueeze of a NumPy array
print("Input shape:", sample_image.shape)
print("Output shape:", model(mindspore.Tensor(sample_image), timestep=0)[0].shape)

# -- Create a scheduler
from mindone.diffusers import DDPMScheduler

noise_scheduler = DDPMScheduler(num_train_timesteps=1000)
noise = mindspore.ops.randn(sample_image.shape)
timesteps = mindspore.Tensor([50])
noisy_image = noise_scheduler.add_noise(sample_image, noise, timesteps)

Image.fromarray(((noisy_image.permute(0, 2, 3, 1) + 1.0) * 127.5).type(mindspore.uint8).numpy()[0])

from mindspore import ops

noise_pred = model(noisy_image, timesteps)[0]
loss = ops.mse_loss(noise_pred, noise)

# -- Train the model
from mindone.diffusers.optimization import get_cosine_schedule_with_warmup
from mindspore import nn

lr_scheduler = get_cosine_schedule_with_warmup(
    config.learning_rate,  # in the tutorial without the comma
    num_warmup_steps=config.lr_warmup_steps,
    num_training_steps=(len(train_dataloader) * config.num_epochs),
)
optimizer = nn.AdamWeightDecay(model.trainable_params(), learning_rate=lr_scheduler)

import os

from mindone.diffusers import DDPMPipeline
from mindone.diffusers.utils import make_image_grid


def evaluate(config, epoch, pipeline):
    # Sample some images from random noise (this is the backward diffusion process).
    # The default pipeline output type is `List[PIL.Image]`
    images = pipeline(
        batch_size=config.eval_batch_size,
        generator=np.random.Generator(np.random.PCG64(config.seed)),
    )[0]

    # Make a grid out of the images
    image_grid = make_image_grid(images, rows=4, cols=4)

    # Save the images
    test_dir = os.path.join(config.output_dir, "samples")
    os.makedirs(test_dir, exist_ok=True)
    image_grid.save(f"{test_dir}/{epoch:04d}.png")


from huggingface_hub import create_repo, upload_folder
from mindspore.amp import StaticLossScaler  # the tutorial does not import it
from tqdm.auto import tqdm

from ms_diffsynth import TrainStep  # from mindone.diffusers.training_utils


# Write your train step
class MyTrainStep(TrainStep):
    def __init__(
        self,
        model: nn.Cell,
        optimizer: nn.Optimizer,
        noise_scheduler,
        gradient_accumulation_steps,
        length_of_dataloader,
    ):
        super().__init__(
            model,
            optimizer,
            StaticLossScaler(65536),
            1.0,
            gradient_accumulation_steps,
            gradient_accumulation_kwargs=dict(length_of_dataloader=length_of_dataloader),
        )
        self.model = model
        self.noise_scheduler = noise_scheduler
        self.noise_scheduler_num_train_timesteps = noise_scheduler.config.num_train_timesteps

    def forward(self, clean_images):
        # Sample noise to add to the images
        noise = ops.randn(clean_images.shape)
        bs = clean_images.shape[0]

        # Sample a random timestep for each image
        timesteps = ops.randint(
            0, self.noise_scheduler_num_train_timesteps, (bs,), dtype=mindspore.int64  # in the tutorial without self
        )

        # Add noise to the clean images according to the noise magnitude at each timestep
        # (this is the forward diffusion process)
        noisy_images = self.noise_scheduler.add_noise(clean_images, noise, timesteps)

        # Predict the noise residual
        noise_pred = self.model(noisy_images, timesteps, return_dict=False)[0]
        loss = ops.mse_loss(noise_pred, noise)
        loss = self.scale_loss(loss)
        return loss, noise_pred


is_main_process, is_local_main_process = True, True
train_step = MyTrainStep(model, optimizer, noise_scheduler, config.gradient_accumulation_steps, len(train_dataloader))
pipeline = DDPMPipeline(unet=model, scheduler=noise_scheduler)


def train_loop(config, model, noise_scheduler, optimizer, train_dataloader, lr_scheduler):
    if is_main_process:
        if config.output_dir is not None:
            os.makedirs(config.output_dir, exist_ok=True)
        if config.push_to_hub:
            repo_id = create_repo(
                repo_id=config.hub_model_id or Path(config.output_dir).name, exist_ok=True
            ).repo_id

    global_step = 0
    history = []  # new: what the test looks at, in place of accelerator.log, which the tutorial does not have

    # Now you train the model
    for epoch in range(config.num_epochs):
        progress_bar = tqdm(total=len(train_dataloader), disable=not is_local_main_process)
        progress_bar.set_description(f"Epoch {epoch}")

        for step, batch in enumerate(train_dataloader):
            loss, model_pred = train_step(*batch)

            progress_bar.update(1)
            # in the tutorial loss.detach(), which MindSpore's Tensor does not have, and get_last_lr() of a list
            logs = {"loss": loss.item(), "lr": lr_scheduler[global_step], "step": global_step}
            progress_bar.set_postfix(**logs)
            history.append(logs)
            global_step += 1

        # After each epoch you optionally sample some demo images with evaluate() and save the model
        if is_main_process:
            if (epoch + 1) % config.save_image_epochs == 0 or epoch == config.num_epochs - 1:
                evaluate(config, epoch, pipeline)

            if (epoch + 1) % config.save_model_epochs == 0 or epoch == config.num_epochs - 1:
                pipeline.save_pretrained(config.output_dir)  # in the tutorial only if nothing is pushed
                if config.push_to_hub:
                    upload_folder(
                        repo_id=repo_id,
                        folder_path=config.output_dir,
                        commit_message=f"Epoch {epoch}",
                        ignore_patterns=["step_*", "epoch_*"],
                    )
    return history


history = train_loop(config, model, noise_scheduler, optimizer, train_dataloader, lr_scheduler)

import glob

sample_images = sorted(glob.glob(f"{config.output_dir}/samples/*.png"))
Image.open(sample_images[-1])
