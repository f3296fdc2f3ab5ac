#!/usr/bin/env bash
# Train with the credit of TEMPO and the ratio and clip of CTPO in verl, on one machine with GPUs:
#
#   pip install . verl "TransferQueue>=0.1.10" vllm  # in a clone of tokcredit
#   DATA=~/data/gsm8k MODEL=Qwen/Qwen2.5-0.5B-Instruct examples/verl/tempo_ctpo.sh
#
# The data are verl's parquet files, for example those of its gsm8k script. Further arguments override verl's
# configuration; `--cfg job` prints the configuration and runs nothing.
set -euo pipefail
data=${DATA:-$HOME/data/gsm8k}
model=${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}

exec "${PYTHON:-python}" -m verl.trainer.main_ppo \
  trainer.v1.trainer_mode=tokcredit_sync \
  algorithm.adv_estimator=tokcredit_tempo \
  actor_rollout_ref.actor.policy_loss.loss_mode=tokcredit_ctpo \
  actor_rollout_ref.actor.loss_agg_mode=token-mean \
  data.train_files="$data/train.parquet" \
  data.val_files="$data/test.parquet" \
  data.train_batch_size=256 \
  data.max_prompt_length=512 \
  data.max_response_length=1024 \
  actor_rollout_ref.model.path="$model" \
  actor_rollout_ref.actor.optim.lr=1e-6 \
  actor_rollout_ref.actor.ppo_mini_batch_size=64 \
  actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8 \
  actor_rollout_ref.rollout.name=vllm \
  actor_rollout_ref.rollout.n=8 \
  actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
  actor_rollout_ref.rollout.gpu_memory_utilization=0.5 \
  actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8 \
  trainer.n_gpus_per_node="${GPUS:-1}" \
  trainer.nnodes=1 \
  trainer.total_epochs=1 \
  trainer.logger='[console]' \
  "$@"
