"""Keys of the training loop, the same for every algorithm. No torch here.

An algorithm's own keys live in its folder; a recipe's ``config:`` is the union of the two.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt


class TrainingConfig(BaseModel):
    """What the loop needs to know. Names and defaults of the original description are kept."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    epoch: int = Field(
        360, ge=0, le=1_000_000, description="epochs to train; 0 folds, cuts, verifies, exports"
    )
    lr: float = Field(0.1, gt=0, description="learning rate")
    batch_size: int = Field(128, ge=1, description="training samples a step")
    test_batch_size: int = Field(128, ge=1, description="validation samples a step")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum, for optimizers that have one")
    weight_decay: float = Field(1e-4, ge=0, description="weight decay")
    nesterov: bool = Field(False, description="Nesterov momentum in the default optimizer")
    no_decay: tuple[str, ...] = Field(
        (), description="parameter name patterns without weight decay; also `norm` and `bias`"
    )
    bias_lr_multiplier: float = Field(1.0, gt=0, description="learning rate factor of biases")
    num_workers: int = Field(0, ge=0, description="data loader processes")
    devices: tuple[NonNegativeInt, ...] | Literal["cpu"] = Field(
        (), description="CUDA ids; [] takes one GPU if there is one, else the CPU; `cpu` forces it"
    )
    num_processes: int | None = Field(
        None, ge=1, description="CPU processes to train with (gloo); default: one a device"
    )
    precision: Literal["32", "bf16-mixed", "16-mixed"] = Field(
        "32", description="training precision"
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="seed of everything random")
    deterministic: bool = Field(False, description="torch's deterministic algorithms only")
    accumulate_grad_batches: int = Field(1, ge=1, description="batches an optimizer step")
    gradient_clip: float | None = Field(None, gt=0, description="largest gradient norm")
    channels_last: bool = Field(False, description="channels-last memory format")
    compile: bool = Field(False, description="torch.compile the model")
    scheduler_interval: Literal["epoch", "step"] = Field(
        "epoch", description="when the scheduler steps"
    )
    warmup_steps: int = Field(
        0, ge=0, description="optimizer steps of linear learning-rate warm-up"
    )
    log_interval: int = Field(200, ge=1, description="steps between log entries")
    train_metrics: bool = Field(
        False, description="call evaluate_function on training batches too, every log_interval"
    )
    save_dir: str = Field("checkpoints", description="folder that holds the run folders")
    save_keyword: str = Field("acc", description="metric that chooses the best checkpoint")
    metric_mode: Literal["max", "min"] = Field("max", description="whether more or less is better")
    save_deploy_format: bool = Field(
        True, description="write deploy artifacts; false stores the best model in training form"
    )
    save_every_minutes: float = Field(
        10.0, gt=0, description="largest age of the last checkpoint inside an epoch"
    )
    teacher_weight: float = Field(
        1.0, ge=0, description="weight of the distance to the teacher's prediction in the loss"
    )
    teacher_temperature: float = Field(
        1.0, gt=0, description="softens both predictions before they are compared"
    )
    input_shapes: tuple[tuple[int, ...], ...] | None = Field(
        None, description="input sizes without batch, for counting; default: from a real batch"
    )
