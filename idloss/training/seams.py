# ruff: noqa
# mypy: ignore-errors
"""What stands in for parts of data and evaluation that are being rebuilt; it goes with them."""

import hashlib

import torch

from idloss.data import DataError, Fault

try:
    from idloss.data import Faces
except ImportError:
    Faces = object


def as_faces(faces):
    return faces if hasattr(faces, "crop") else _Faces(faces)


class _Faces:
    def __init__(self, old):
        self.old = old
        self.crop = old.template
        total = hashlib.sha256(repr((old.template, old.names)).encode())
        if hasattr(old, "content"):
            self.content = old.content
        else:
            if hasattr(old, "crops"):
                total.update(old.crops.numpy().data)
            elif old.landmarks is not None:
                total.update(old.landmarks.contiguous().numpy().data)
            self.content = total.hexdigest()

    def __getattr__(self, name):
        if name == "old":
            raise AttributeError(name)
        return getattr(self.old, name)

    def __len__(self):
        return len(self.old)

    def select(self, keep):
        return _Faces(self.old.select(keep))

    def crops_at(self, indices, crop=None, *, faults=None):
        from idloss.data.aligned import align_some
        from idloss.geometry import get_template

        indices = torch.as_tensor(indices)
        if self.crop is not None:
            return self.old.crops_at(indices)
        try:
            return align_some(self.old, indices.tolist(), get_template(crop))
        except ValueError as error:
            if len(indices) > 1:
                return torch.cat([self.crops_at(i[None], crop, faults=faults) for i in indices])
            place = int(indices[0])
            found = (
                error.faults[0]
                if isinstance(error, DataError)
                else Fault(self.names[place], str(error))
            )
            if faults is None:
                raise DataError([found]) from None
            faults[place] = found
            return torch.zeros(1, 3, *get_template(crop).size, dtype=torch.uint8)
