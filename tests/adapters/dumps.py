"""JSONL that verl's trainers write with ``rollout_data_dir``, from the rows of ``verl_batch``.

As a script it writes them anew where the tests of reports read them: ``python tests/adapters/dumps.py``.
"""

from pathlib import Path

import numpy as np
import tiny
import torch
import transfer_queue as tq
import verl_batch as vb
from omegaconf import OmegaConf
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.ppo.v1 import PPOTrainerSync

FILES = Path(__file__).parents[1] / "report/files"
STEP = 3


def _trainer(kind):
    """A trainer that has been given what its functions that write read."""
    trainer = object.__new__(kind)
    trainer.tokenizer, trainer.global_steps = tiny.tokenizer(), STEP
    trainer._init_dump_executor()
    return trainer


def v1(folder):
    """The dump of a V1 trainer, a padding row of verl's own included; needs Ray."""
    rows = vb.batch(padding=0)
    keys = [row["key"] for row in rows]
    fields = vb.tensordict(rows)
    fields["uid"] = [row["uid"] for row in rows]
    fields["reward_model"] = [{"ground_truth": "4"} for _ in rows]
    tq.init(OmegaConf.create({"backend": {"SimpleStorage": {"num_data_storage_units": 1}}}))
    tq.kv_batch_put(keys=keys, partition_id="dump", fields=fields, tags=[{} for _ in keys])
    meta = tq.KVBatchMeta(keys=keys, tags=[{} for _ in keys], partition_id="dump")
    trainer = _trainer(PPOTrainerSync)
    meta = upsample_batch_to_divisible_size(meta, 4, trainer.tokenizer.eos_token_id)
    trainer._log_rollout_data(meta, {}, str(folder))
    trainer._shutdown_dump_executor()
    tq.kv_clear(keys=meta.keys, partition_id="dump")
    return folder / f"{STEP}.jsonl"


def v0(folder):
    """The dump of the older trainer, which writes as text what JSON does not know."""
    rows = vb.batch(padding=0)
    proto = vb.data_proto(rows)
    proto.batch["prompts"] = torch.stack([row["prompts"] for row in rows])
    proto.batch["responses"] = vb.padded(rows, "responses")
    proto.batch["token_level_scores"] = proto.batch["rm_scores"]
    proto.non_tensor_batch["reward_model"] = np.array([{"ground_truth": "4"} for _ in rows], dtype=object)
    trainer = _trainer(RayPPOTrainer)
    infos = {"acc": [np.float32(row["rm_scores"].sum().item()) for row in rows]}
    trainer._log_rollout_data(proto, infos, {}, str(folder))
    trainer._shutdown_dump_executor()
    return folder / f"{STEP}.jsonl"


DUMPS = {"verl-v1.jsonl": v1, "verl-v0.jsonl": v0}


if __name__ == "__main__":
    import tempfile

    import ray

    ray.init(num_cpus=4, include_dashboard=False)
    for name, write in DUMPS.items():
        with tempfile.TemporaryDirectory() as folder:
            (FILES / name).write_text(write(Path(folder)).read_text())
    tq.close()
    ray.shutdown()
