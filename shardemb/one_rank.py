"""What a single rank leaves out: there are no other copies of the dense parameters to average."""

import torch
from torchrec.distributed.model_parallel import DataParallelWrapper, DistributedModelParallel
from torchrec.distributed.types import ShardingEnv


class NoOtherRanks(DataParallelWrapper):  # type: ignore[misc]
    """Puts the dense part on its device, and no `DistributedDataParallel` around the model.

    On one rank that would copy gradients into buckets, hand them to a thread of gloo's and wait for
    it, to divide by one.
    """

    def wrap(
        self,
        dmp: DistributedModelParallel,
        env: ShardingEnv,  # noqa: ARG002 - TorchRec's
        device: torch.device,
    ) -> None:
        """What TorchRec calls in the place of its own wrapper.

        Args:
            dmp: The model, which is changed.
            env: Of the single rank.
            device: Where the dense part belongs.
        """
        dmp._dmp_wrapped_module = dmp._dmp_wrapped_module.to(device)
