"""Files that are no checkpoint, some of which would run code."""

import io
import os
import pickle
import zipfile
from argparse import Namespace

import numpy as np
import torch
from torch import nn


class Attack:
    """Writes the file ``hacked`` where it is unpickled."""

    def __reduce__(self):
        return os.system, ('echo hacked > hacked',)


class Script(nn.Module):
    """Writes the file ``hacked`` where its archive of TorchScript is loaded."""

    @torch.jit.export
    def __getstate__(self) -> tuple[bool]:
        return (self.training,)

    @torch.jit.export
    def __setstate__(self, state: tuple[bool]) -> None:
        self.training = state[0]
        torch.save(torch.zeros(1), 'hacked')

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


HOSTILE = ['hostile', 'old format', 'namespace with a call', 'plain pickle', 'script']
BROKEN = ['truncated', 'zip', 'objects', 'text', 'empty']


def make_file(kind, weights):
    """Bytes of a kind of file; ``weights`` is what it would hold if it were good."""
    file = io.BytesIO()
    if kind == 'hostile':
        torch.save(dict(state_dict=weights, x=Attack()), file)
    elif kind == 'old format':
        torch.save(Attack(), file, _use_new_zipfile_serialization=False)
    elif kind == 'namespace with a call':
        torch.save(dict(state_dict=weights, args=Namespace(x=Attack())), file)
    elif kind == 'plain pickle':
        pickle.dump(Attack(), file)
    elif kind == 'script':
        torch.jit.save(torch.jit.script(Script()), file)
    elif kind == 'truncated':
        torch.save(weights, file)
        return file.getvalue()[:-1000]
    elif kind == 'zip':
        zipfile.ZipFile(file, 'w').writestr('a', 'b')
    elif kind == 'objects':
        torch.save(dict(a=np.array([[1], 'x'], dtype=object)), file)
    return b'hello world' if kind == 'text' else file.getvalue()
