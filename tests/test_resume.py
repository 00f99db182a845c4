"""A training that is killed goes on to the same losses."""

import json
import signal
import subprocess
import sys

TRAINING = """
import json, os, signal, sys
import torch
from mmengine.dataset import DefaultSampler
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from clustr_mm import ClusTR

folder, kill_at, resume = sys.argv[1], int(sys.argv[2]), sys.argv[3] == 'resume'
arch = dict(embed_dims=[16, 16, 16, 16], num_heads=[1, 1, 1, 1],
            mlp_ratios=[1, 1, 1, 1], depths=[1, 1, 1, 1], sr_ratios=[8, 4, 2, 1])

class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.backbone = ClusTR(arch, drop_path_rate=0.0)

    def forward(self, inputs, mode='tensor'):
        maps = self.backbone(inputs)
        return dict(loss=sum(x[:, :4].sub(1).square().mean() for x in maps))

class Record(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        with open(f'{folder}/losses.jsonl', 'a') as file:
            print(json.dumps([runner.iter, outputs['loss'].item()]), file=file)
        if runner.iter == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

torch.manual_seed(0)
generator = torch.Generator().manual_seed(0)
images = list(torch.randn(4, 3, 40, 48, generator=generator))
Runner(
    Model(), folder, resume=resume,
    train_dataloader=dict(
        batch_size=2, num_workers=0, dataset=images,
        sampler=dict(type='DefaultSampler', shuffle=True, seed=1),
        collate_fn=lambda batch: dict(inputs=torch.stack(batch)),
    ),
    train_cfg=dict(by_epoch=True, max_epochs=3),
    optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-2)),
    param_scheduler=dict(type='MultiStepLR', milestones=[1, 2]),
    custom_hooks=[Record()], randomness=dict(seed=0), log_level='ERROR',
).train()
"""


def train(folder, kill_at=-1, resume='new'):
    done = subprocess.run(
        [sys.executable, '-c', TRAINING, folder, str(kill_at), resume],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == (-signal.SIGKILL if kill_at > 0 else 0), done.stderr
    return [json.loads(line) for line in (folder / 'losses.jsonl').open()]


def test_killed_training_resumes_to_the_same_losses(tmp_path):
    (tmp_path / 'whole').mkdir()
    (tmp_path / 'killed').mkdir()
    whole = train(tmp_path / 'whole')
    assert [i for i, _ in whole] == [0, 1, 2, 3, 4, 5]
    assert len({loss for _, loss in whole}) == 6

    killed = train(tmp_path / 'killed', kill_at=2)  # in the second of three epochs
    assert killed == whole[:3]
    resumed = train(tmp_path / 'killed', resume='resume')[3:]
    assert resumed == whole[2:]
