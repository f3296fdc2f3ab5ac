"""Against stock TRL: the same rollouts through both trainers give the same losses, gradients and metrics."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import pytest
import tokcredit as tc
import torch

pytest.importorskip("trl", reason="TRL is not installed; make test-trl")
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import completions
import pyarrow.parquet as pq
import recipes
import scripted
import tiny
import transformers
import trl
from datasets import Dataset
from pages import blocks
from tokcredit import report
from tokcredit.adapters.trl import CreditGRPOTrainer

AS_TRL = tc.credit.group_normalized(epsilon=1e-4)
PARITY = {
    "grpo": (tc.methods.grpo(epsilon=1e-4), dict(loss_type="grpo")),
    "dapo": (replace(tc.methods.dapo(), credit=AS_TRL), dict(loss_type="dapo", epsilon_high=0.28)),
    "dr_grpo": (tc.methods.dr_grpo(), dict(loss_type="dr_grpo", scale_rewards="none")),
    "gspo": (
        replace(tc.methods.gspo(), credit=AS_TRL),
        dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4),
    ),
    "cispo": (
        replace(tc.methods.cispo(clip_high=0.1), credit=AS_TRL),
        dict(loss_type="cispo", epsilon_high=1.1),
    ),
    "sapo": (replace(tc.methods.sapo(), credit=AS_TRL), dict(loss_type="sapo")),
    "luspo": (
        replace(tc.methods.luspo(3e-4, 4e-4), credit=AS_TRL),
        dict(loss_type="luspo", importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4),
    ),
    "vespo": (replace(tc.methods.vespo(), credit=AS_TRL), dict(loss_type="vespo")),
    "delta": (
        tc.Objective(AS_TRL, clip=tc.clip.ppo(0.2, 0.2, 1.5), aggregation=tc.aggregation.token_mean()),
        dict(loss_type="dapo", delta=1.5),
    ),
}
SHARED = ("loss", "grad_norm", "reward", "entropy", "kl", "clip_ratio/low_mean", "clip_ratio/high_mean")


def same_gradients(ours, theirs):
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 5e-5 * b.norm() + 1e-6
    assert max(b.norm() for b in theirs) > 1e-2, "a comparison of zeros proves nothing"


def equal(ours, theirs, compared=SHARED):
    (trainer, gradients), (stock, expected) = ours, theirs
    same_gradients(gradients, expected)
    for a, b in zip(trainer.state.log_history[:-1], stock.state.log_history[:-1], strict=True):
        for name in compared:
            assert (name in a) == (name in b), name
            if name in a:
                assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("name", PARITY)
def test_equals_stock_trl(name, tmp_path):
    """Two generations of two optimizer steps and two iterations, with tool tokens and cut-off rows."""
    objective, settings = PARITY[name]
    ours = scripted.train(CreditGRPOTrainer, scripted.arguments(tmp_path), objective=objective)
    theirs = scripted.train(trl.GRPOTrainer, scripted.arguments(tmp_path, **settings))
    # TRL counts a sequence-level clip once per row, and bounds no ratio of cispo and sapo under these names.
    counted = name in ("grpo", "dapo", "dr_grpo", "delta")
    clips = ["clip_ratio/low_mean", "clip_ratio/high_mean"] if counted else []
    assert name in ("sapo", "vespo") or ours[0].state.log_history[2]["clip_ratio/region_mean"] > 0, (
        "nothing was clipped"
    )
    equal(ours, theirs, ("loss", "grad_norm", "reward", "entropy", *clips))


@pytest.mark.parametrize("mode", [None, "token_truncate", "sequence_mask"])
def test_off_policy_mask_and_correction_for_the_engine(mode, tmp_path, monkeypatch):
    """Rows with a negative advantage that have become much less probable than under the engine have no gradient."""
    scripted.with_scripted_engine(monkeypatch)
    reported = scripted.rollout

    def complete(prompts, trainer):
        out = reported(prompts, trainer)
        return {**out, "logprobs": [[-2.0 if x is None else x for x in row] for row in out["logprobs"]]}

    monkeypatch.setattr(scripted, "rollout", complete)
    objective, settings = PARITY["dapo"]
    engine = dict(use_vllm=True, vllm_importance_sampling_correction=False)
    correction = dict(vllm_importance_sampling_correction=mode is not None, off_policy_mask_threshold=0.1)
    if mode is not None:
        correction |= dict(vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_max=1.5)
    args = scripted.arguments(tmp_path, **{**engine, **settings, **correction})
    translated = tc.rollout_correction.from_trl(objective, args)
    ours = scripted.train(CreditGRPOTrainer, scripted.arguments(tmp_path, **engine), objective=translated)
    # TRL counts clips of the rows that it masks too.
    equal(ours, scripted.train(trl.GRPOTrainer, args), ("loss", "grad_norm", "reward", "entropy"))
    unmasked = scripted.train(CreditGRPOTrainer, scripted.arguments(tmp_path, **engine), objective=objective)
    assert not torch.allclose(unmasked[1][0], ours[1][0], rtol=0.1), "nothing was masked"


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_reference_penalty(name, corrected, tmp_path):
    objective, settings = PARITY[name]
    kl = dict(beta=0.3, use_bias_correction_kl=corrected)
    ours = scripted.train(CreditGRPOTrainer, scripted.arguments(tmp_path, **kl), objective=objective)
    theirs = scripted.train(trl.GRPOTrainer, scripted.arguments(tmp_path, **kl, **settings))
    assert ours[0].state.log_history[3]["kl"] > 0
    # TRL logs the mean over tokens whatever the loss averages.
    equal(ours, theirs, [key for key in SHARED if name == "dapo" or key != "kl"])


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_entropy_bonus(name, tmp_path):
    """One micro-batch per optimizer step, so that both take the mean over the same tokens."""
    objective, settings = PARITY[name]
    bonus = dict(entropy_coef=0.5, per_device_train_batch_size=8, gradient_accumulation_steps=1, steps_per_generation=1)
    ours = scripted.train(CreditGRPOTrainer, scripted.arguments(tmp_path, **bonus), objective=objective)
    theirs = scripted.train(trl.GRPOTrainer, scripted.arguments(tmp_path, **bonus, **settings))
    equal(ours, theirs, ("loss", "grad_norm", "reward", "entropy"))
    without = scripted.train(
        CreditGRPOTrainer, scripted.arguments(tmp_path, **bonus | {"entropy_coef": 0.0}), objective=objective
    )
    assert not torch.allclose(without[1][0], ours[1][0], rtol=0.1), "no bonus"


def test_adaptive_entropy(tmp_path):
    """The coefficient moves as in TRL, and is off until a step has measured the entropy."""
    objective, settings = PARITY["dapo"]
    bonus = dict(use_adaptive_entropy=True, entropy_target=100.0, entropy_coef_delta=0.3, entropy_coef_max=0.5)
    bonus |= dict(per_device_train_batch_size=8, gradient_accumulation_steps=1, steps_per_generation=1)
    ours = scripted.train(CreditGRPOTrainer, scripted.arguments(tmp_path, **bonus), objective=objective)
    theirs = scripted.train(trl.GRPOTrainer, scripted.arguments(tmp_path, **bonus, **settings))
    equal(ours, theirs, ("loss", "grad_norm", "reward", "entropy"))
    assert ours[0].entropy_coef == theirs[0].entropy_coef == 0.5
    assert ours[0]._last_world_entropy == pytest.approx(theirs[0]._last_world_entropy, rel=1e-4)


@pytest.mark.parametrize("mode", ["sequence_mask", "sequence_truncate", "token_truncate", "token_mask"])
def test_engine_correction(mode, tmp_path, monkeypatch):
    """TRL's own importance weights multiply our loss, missing engine log-probs included."""
    scripted.with_scripted_engine(monkeypatch)
    objective, settings = PARITY["dapo"]
    engine = dict(use_vllm=True, vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_max=1.5)
    ours = scripted.train(CreditGRPOTrainer, scripted.arguments(tmp_path, **engine), objective=objective)
    theirs = scripted.train(trl.GRPOTrainer, scripted.arguments(tmp_path, **engine, **settings))
    equal(ours, theirs)


def test_unscored_completions(tmp_path):
    objective, settings = PARITY["dapo"]
    rewards = [scripted.sometimes]
    ours = scripted.train(CreditGRPOTrainer, scripted.arguments(tmp_path), rewards, objective=objective)
    theirs = scripted.train(trl.GRPOTrainer, scripted.arguments(tmp_path, **settings), rewards)
    equal(ours, theirs)


def test_weighted_rewards(tmp_path):
    objective, settings = PARITY["grpo"]
    rewards, weighted = [scripted.reward, scripted.sometimes], dict(reward_weights=[0.5, 2.0])
    ours = scripted.train(CreditGRPOTrainer, scripted.arguments(tmp_path, **weighted), rewards, objective=objective)
    theirs = scripted.train(trl.GRPOTrainer, scripted.arguments(tmp_path, **weighted, **settings), rewards)
    equal(ours, theirs)


MASKED = dict(mask_truncated_completions=True, steps_per_generation=2, gradient_accumulation_steps=2)


def test_truncated_completions_leave_the_mean_over_rows(tmp_path):
    """TRL counts the rows that it masked: in group statistics, as ``count_empty`` does, and in the mean over rows."""
    masked = MASKED
    for name in ("dapo", "grpo"):
        objective, settings = PARITY[name]
        objective = replace(objective, credit=replace(AS_TRL, count_empty=True))
        ours = scripted.train(CreditGRPOTrainer, scripted.arguments(tmp_path, **masked), objective=objective)
        theirs = scripted.train(trl.GRPOTrainer, scripted.arguments(tmp_path, **masked, **settings))
        if name == "dapo":
            equal(ours, theirs)
        else:
            kept = sum(row % 3 != 0 for row in range(8))
            torch.testing.assert_close(ours[1][0] * kept / 8, theirs[1][0], rtol=2e-4, atol=1e-6)


def test_truncated_completions_leave_the_group_by_default(tmp_path):
    """Means and deviations of the rewards are those of the rows that end."""
    args = scripted.arguments(tmp_path, **MASKED, max_steps=1)
    trainer, _ = scripted.train(CreditGRPOTrainer, args, method="grpo")
    prepared = trainer._prepared["train"]
    rewards = prepared.batch.rewards.view(-1, scripted.GENERATIONS)
    ended = (prepared.lengths > 0).view(-1, scripted.GENERATIONS)
    assert (~ended).any(1).all() and (ended.sum(1) > 1).all()
    for row, kept, advantages in zip(rewards, ended, prepared.credit.view_as(rewards), strict=True):
        expected = (row[kept] - row[kept].mean()) / (row[kept].std() + 1e-6)
        torch.testing.assert_close(advantages[kept], expected, rtol=1e-4, atol=1e-5)
    assert prepared.credit.abs().sum() > 0.1


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory):
    """What one process and two processes end with, for each method and cut of the groups."""
    results = []
    for ranks in (1, 2):
        folder = tmp_path_factory.mktemp("ranks")
        tiny.model().save_pretrained(folder / "start")  # beforehand, or the ranks race to write it
        local = ["--standalone", "--local-addr=127.0.0.1"]  # whatever the machine's name resolves to
        launch = ["-m", "torch.distributed.run", *local, f"--nproc-per-node={ranks}"] if ranks > 1 else []
        command = [sys.executable, *launch, scripted.__file__, str(folder)]
        loopback = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
        run = subprocess.run(command, env=loopback, stderr=subprocess.PIPE, timeout=400)
        assert run.returncode == 0, run.stderr.decode()[-8000:]
        results.append(torch.load(folder / "results.pt"))
    return results


@pytest.mark.parametrize("rows", scripted.ROWS)
@pytest.mark.parametrize("method", scripted.METHODS)
def test_two_processes_equal_one(method, rows, by_ranks):
    one, two = (results[method, rows] for results in by_ranks)
    same_gradients(two["steps"], one["steps"])
    assert one["table"] == pytest.approx(two["table"], abs=1e-5)
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a.keys() == b.keys()
        for name in {"loss", "reward", "tokcredit/policy_loss"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name


def test_evaluation_leaves_training_alone(tmp_path):
    """An evaluation between two iterations over one generation batch must not replace what was prepared for it."""

    def with_evaluation(trainer):
        evaluate, trainer.evaluations = trainer.evaluate, []

        def evaluated(*arguments, **keywords):
            before = trainer.generations  # the script of the training rollouts goes on where it was
            trainer.evaluations.append(evaluate(*arguments, **keywords)["eval_loss"])
            trainer.generations = before

        trainer.evaluate = evaluated

    settings = dict(eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4)
    plain = scripted.train(CreditGRPOTrainer, scripted.arguments(tmp_path), method="tempo")
    data = Dataset.from_dict({"prompt": scripted.PROMPTS[:2]})
    watched = scripted.train(
        CreditGRPOTrainer,
        scripted.arguments(tmp_path, **settings),
        prepare=with_evaluation,
        method="tempo",
        eval_dataset=data,
    )
    assert len(watched[0].evaluations) == 4
    same_gradients(watched[1], plain[1])


def test_advantages_are_those_of_the_method(tmp_path):
    trainer, _ = scripted.train(CreditGRPOTrainer, scripted.arguments(tmp_path, max_steps=1), method="tempo")
    prepared = trainer._prepared["train"]
    batch = prepared.batch
    expected = tc.methods.tempo().prepare(
        tc.Rollouts.from_padded(
            batch.tokens.view(batch.shape),
            batch.response_mask.view(batch.shape),
            torch.arange(batch.num_rows) // scripted.GENERATIONS,
            batch.rewards,
            torch.arange(batch.shape[1]) < (batch.end - batch.begin)[:, None],
        )
    )
    torch.testing.assert_close(prepared.advantages, expected.advantages)
    inside = prepared.advantages.masked_fill(~expected.mask.view(batch.shape), torch.nan)
    assert any(row[~row.isnan()].unique().numel() > 1 for row in inside), "no row has different advantages"
    micro = torch.cat([part["rollout"] for part in trainer._buffered_inputs])
    advantages = torch.cat([part["advantages"] for part in trainer._buffered_inputs])
    assert sorted(micro.tolist()) == list(range(batch.num_rows)) != micro.tolist()
    torch.testing.assert_close(advantages, expected.advantages[micro])


@dataclass(frozen=True)
class undecided(tc.filters.Filter):
    """The tokens of high entropy."""

    reads: ClassVar[frozenset[str]] = frozenset({"entropies", "old_log_probs"})

    def __call__(self, batch, advantages):
        entropies = batch.input("entropies")
        return entropies > entropies[batch.response_mask].median()


def test_collects_inputs_that_trl_had_no_use_for(tmp_path):
    settings = dict(max_steps=1, steps_per_generation=2, num_iterations=1)
    objective = tc.Objective(filters=(undecided(),))
    trainer, gradients = scripted.train(
        CreditGRPOTrainer, scripted.arguments(tmp_path, **settings), objective=objective
    )
    batch = trainer._prepared["train"].batch
    part = trainer._buffered_inputs[0]
    with torch.no_grad():
        start = tiny.model()
        ids = torch.cat([part["prompt_ids"], part["completion_ids"]], 1)
        mask = torch.cat([part["prompt_mask"], part["completion_mask"]], 1)
        logits = start(ids, attention_mask=mask).logits[:, -1 - part["completion_ids"].shape[1] : -1].log_softmax(-1)
    entropies = -(logits.exp() * logits).sum(-1)
    chosen = logits.gather(-1, part["completion_ids"][..., None])[..., 0]
    real = part["completion_mask"].bool()
    rows = part["rollout"]
    torch.testing.assert_close(batch.entropies.view(batch.shape)[rows][real], entropies[real], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch.old_log_probs.view(batch.shape)[rows][real], chosen[real], rtol=1e-4, atol=1e-5)
    mask = trainer._prepared["train"].mask
    assert 0 < mask.sum() < batch.response_mask.sum() and gradients[0].norm() > 0


@dataclass(frozen=True)
class credit_from_hidden_states(tc.credit.Credit):
    reads: ClassVar[frozenset[str]] = frozenset({"hidden_states"})


@dataclass(frozen=True)
class weight_from_hidden_states(tc.token_weights.TokenWeight):
    reads: ClassVar[frozenset[str]] = frozenset({"hidden_states"})


@pytest.mark.parametrize(
    ("settings", "keywords", "message"),
    [
        (dict(loss_type="cispo"), dict(method="grpo"), "loss_type: expected TRL's default 'dapo'"),
        (dict(epsilon_high=0.28), dict(method="dapo"), "epsilon_high: expected .* clip stage"),
        (dict(importance_sampling_level="sequence"), dict(method="gspo"), "importance_sampling_level: .* ratio stage"),
        (dict(scale_rewards="none"), dict(method="dr_grpo"), "scale_rewards: .* credit stage"),
        (dict(top_entropy_quantile=0.2), dict(method="grpo"), "top_entropy_quantile: .* choose tokens"),
        (dict(entropy_coef=0.1), dict(objective=tc.mix("grpo", terms="entropy(0.1)")), "entropy_coef: expected 0"),
        ({}, dict(objective=tc.Objective(terms=(tc.term.kl(0.1, estimator="k2"),))), "beta: expected 0.1"),
        (
            {},
            dict(objective=tc.Objective(terms=(tc.term.kl(tc.schedule.linear(0.1, 0.2)),))),
            "beta: expected a number other than 0",
        ),
        ({}, dict(objective=tc.mix("grpo", terms="entropy(target_entropy(0.1))")), "expected no controller"),
        ({}, dict(objective=tc.Objective(credit_from_hidden_states())), "credit stage .* requires hidden_states"),
        (
            {},
            dict(objective=tc.Objective(token_weights=(weight_from_hidden_states(),))),
            "token_weight stage .* requires hidden_states",
        ),
        (
            {},
            dict(objective=tc.Objective(token_weights=(tc.token_weights.importance(),))),
            "token_weight stage .* requires rollout_log_probs",
        ),
        ({}, dict(method="real"), "scales that do not compare the rows of a group, because TRL cuts"),
        ({}, dict(method="gppo"), "name: expected one of"),
    ],
)
def test_refuses_what_would_be_ignored(settings, keywords, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        CreditGRPOTrainer(tiny.model(), scripted.reward, scripted.arguments(tmp_path, **settings), **keywords)


def test_every_option_is_in_the_table():
    """An option that a later TRL adds fails here until docs/hosts.md says what it is."""
    own = {f.name for f in fields(trl.GRPOConfig)} - {f.name for f in fields(transformers.TrainingArguments)}
    table = (Path(__file__).parents[2] / "docs/hosts.md").read_text().split("\n### TRL\n")[1].split("\n### ")[0]
    assert len(own) > 50 and not {name for name in own if not re.search(rf"\b{name}\b", table)}


def test_refuses_to_correct_for_the_engine_twice(tmp_path, monkeypatch):
    scripted.with_scripted_engine(monkeypatch)
    objective = tc.Objective(token_weights=(tc.token_weights.importance(),))
    with pytest.raises(ValueError, match="vllm_importance_sampling_correction: expected False"):
        CreditGRPOTrainer(
            tiny.model(), scripted.reward, scripted.arguments(tmp_path, use_vllm=True), objective=objective
        )


@pytest.mark.parametrize("keywords", [{}, dict(method="grpo", objective=tc.methods.grpo())])
def test_takes_one_objective(keywords, tmp_path):
    with pytest.raises(TypeError, match="method, objective: expected exactly one of them"):
        CreditGRPOTrainer(tiny.model(), scripted.reward, scripted.arguments(tmp_path), **keywords)


@pytest.mark.parametrize("keywords", [dict(method="sft"), dict(objective=tc.methods.dpo())])
def test_takes_policy_gradient_objectives(keywords, tmp_path):
    with pytest.raises(TypeError, match=r"objective: expected a tokcredit\.Objective, got"):
        CreditGRPOTrainer(tiny.model(), scripted.reward, scripted.arguments(tmp_path), **keywords)


def test_settings_follow_the_progress_of_training(tmp_path):
    plain, other = tc.credit.group_normalized(), tc.credit.leave_one_out()
    args = scripted.arguments(tmp_path, steps_per_generation=2)
    objective = tc.Objective(tc.credit.sum(plain, other, tc.schedule.linear(0.1, 0.5)))
    trainer, _ = scripted.train(CreditGRPOTrainer, args, objective=objective)
    prepared = trainer._prepared["train"]
    # The second generation batch is sampled after two of four steps.
    assert prepared.objective.credit.weight == pytest.approx(0.3)
    torch.testing.assert_close(prepared.credit, plain(prepared.batch) + 0.3 * other(prepared.batch))


def test_missing_key_is_loud(tmp_path, monkeypatch):
    stock = trl.GRPOTrainer._generate_and_score_completions

    def renamed(self, inputs):
        batch = stock(self, inputs)
        batch["completion_attention"] = batch.pop("completion_mask")
        return batch

    monkeypatch.setattr(trl.GRPOTrainer, "_generate_and_score_completions", renamed)
    with pytest.raises(RuntimeError, match="expected completion_mask in the batch"):
        scripted.train(CreditGRPOTrainer, scripted.arguments(tmp_path), method="grpo")


def test_missing_hook_is_loud(tmp_path, monkeypatch):
    monkeypatch.delattr(trl.GRPOTrainer, "_compute_loss")
    with pytest.raises(RuntimeError, match=r"trl: expected a version .* with _compute_loss"):
        CreditGRPOTrainer(tiny.model(), scripted.reward, scripted.arguments(tmp_path), method="grpo")


@pytest.mark.parametrize("method", ["tempo", "ctpo"])
def test_a_step_follows_the_advantages(method, tmp_path):
    """Completions that the model samples: one small step raises the sum of advantage times log-prob."""

    def by_place(completions, **columns):
        return [(i % 3) / 2 for i in range(len(completions))]

    args = scripted.arguments(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        num_generations=8,
        max_completion_length=8,
        learning_rate=1e-3,
        num_iterations=1,
    )
    data = Dataset.from_dict({"prompt": scripted.PROMPTS * 8})
    trainer = CreditGRPOTrainer(
        tiny.model(), by_place, args, method=method, train_dataset=data, processing_class=tiny.tokenizer()
    )
    kept, generate = [], trainer._generate_and_score_completions

    @torch.no_grad()
    def log_probs(batch):
        return trainer._forward(trainer.model, batch)[0].double()

    def generated(inputs):
        batch = generate(inputs)
        kept.append((batch, log_probs(batch)))
        return batch

    trainer._generate_and_score_completions = generated
    trainer.train()
    ((batch, before),) = kept
    after = log_probs(batch)
    assert batch["advantages"].abs().sum() > 1
    assert (batch["advantages"] * batch["completion_mask"] * (after - before)).sum() > 0


def test_recipe(tmp_path):
    """As ``docs/hosts.md`` prints it."""
    tiny.model().save_pretrained(tmp_path / "start")
    tiny.tokenizer().save_pretrained(tmp_path / "start")
    args = scripted.arguments(tmp_path, max_steps=1)
    data = Dataset.from_dict({"prompt": scripted.PROMPTS * 8})
    trainer = recipes.run("TRL")["make_trainer"](str(tmp_path / "start"), scripted.reward, args, data)
    assert trainer.credit_objective == tc.mix("ctpo", credit="tempo", aggregation="tempo")
    trainer.train()
    assert trainer.state.log_history[0]["tokcredit/ratio_mean"] == pytest.approx(1.0, abs=1e-4)


def test_readme(tmp_path):
    """The block of the README runs with the names that a user of TRL has."""
    (code,) = (block for block in blocks("README.md") if "CreditGRPOTrainer" in block)
    data = Dataset.from_dict({"prompt": scripted.PROMPTS * 8})
    args = scripted.arguments(tmp_path, max_steps=1)
    tiny.model().save_pretrained(tmp_path / "start")
    tiny.tokenizer().save_pretrained(tmp_path / "start")
    names = {"model": str(tmp_path / "start"), "reward_funcs": scripted.reward, "args": args, "data": data}
    exec(code, names)
    names["trainer"].train()
    assert names["trainer"].credit_objective.credit == tc.methods.tempo().credit


@pytest.mark.parametrize("name", completions.TABLES)
def test_tables_that_reports_read(tmp_path, name):
    """``tests/report`` reads what this version of TRL writes."""
    functions, chat = completions.TABLES[name]
    written, kept = (
        pq.read_table(file).drop_columns("advantage")  # which rounds otherwise on another processor
        for file in (completions.write(tmp_path, name, functions, chat), completions.FILES / name)
    )
    assert written.schema.equals(kept.schema) and written.to_pylist() == kept.to_pylist()


def test_reports_read_tables_of_our_trainer(tmp_path):
    """The sum of the weighted reward functions is the reward that TRL trained with."""
    functions, _ = completions.TABLES["trl-chat.parquet"]
    weights = {"right": 2.0, "reward": -1.0}
    file = completions.write(tmp_path, "x.parquet", functions, True, CreditGRPOTrainer, method="grpo")
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    run = report.read(file, rewards=weights)
    rows = pq.read_table(file).to_pylist()
    assert run.batch.rewards.tolist() == [2 * row["right"] - (row["reward"] or 0) for row in rows]
    assert len({row["completion"][0]["content"] for row in rows}) > 8 and run.batch.response_mask.all()


def test_example(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    example = Path(__file__).parents[2] / "examples/trl_sums.py"
    arguments = ["--model", tmp_path, "--steps", "2", "--output", tmp_path / "out", "--cpu"]
    run = subprocess.run([sys.executable, example, *arguments], capture_output=True, text=True, check=True)
    assert run.stdout.count("tokcredit/ratio_mean") == 2
