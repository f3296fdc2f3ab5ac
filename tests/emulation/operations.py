"""The native operations as the emulation sees them: their arguments by name, and how close two results must be.

A signature that changes in ``csrc/bind`` changes in ``SIGNATURES``, and in its generator in ``fuzz.py``.
"""

import torch

# Arguments in order; results are marked.
SIGNATURES = {
    "scan": "x begin end mask decay decays carry_in reverse exclusive =y =carry_out threads",
    "tree_build": "tokens begin end group groups =leaf =parent =group_of =depth =length =count =degree =size threads",
    "tree_fold": "leaf parent scale x =y",
    "tree_mean": "leaf parent counts x change =y",
    "expand": "begin end mask row leaf parent depth body head =y threads",
    "segment_rows": "x begin end mask reduction ddof =y threads",
    "weighted_moments": "x weights begin end mask ddof =y",
    "segment_ids": "x ids mask reduction ddof =y",
    "standardize": "x group moments standard epsilon =y",
    "row_affine": "x factor shift begin end mask low high =y threads",
    "select": "x begin end mask scope wanted scopes share rounding least ranks =y threads",
    "maximum_variance": "x scope wanted scopes share rounding least largest =chosen",
    "within_mean": "x begin end mask budget least =chosen",
    "diverse": "x score begin end mask number steps weight product =order threads",
    "policy_loss": "log_probs reference operands numbers begin end mask trains surrogate source on value both_sides "
    "bound power limit clamp_low clamp_high =values =stats =slopes threads",
    "scale_rows": "x factor begin end =y threads",
    "logits": "logits tokens temperature temperatures scale softcap chosen =log_probs =entropies =squares "
    "=chosen_log_probs =logsumexp threads",
    "logits_state": "logits tokens temperature temperatures scale softcap chosen first ids before =state threads",
    "logits_gradient": "logits tokens temperature temperatures scale softcap chosen first ids logsumexp entropies "
    "squares grad_log_probs grad_entropies grad_squares grad_chosen =grad threads",
    "divergence": "student teacher other weights mask kind share temperature =values =entropies =saved threads",
    "divergence_gradient": "student teacher other weights mask kind share temperature saved grad_values =grad threads",
    "divergence_top": "student ids log_probs mask kind share outside temperature =values =entropies =saved =slopes "
    "threads",
    "divergence_top_gradient": "student ids mask temperature saved slopes grad_values =grad threads",
    "repack": "x source target length =y threads",
    "piece_offsets": "marks begin end cut =offset",
    "pieces": "marks begin end offset cut =piece_begin =piece_end =row =at",
    "pair_link": "scores divisors pairs weights functions numbers scale =total =slopes =table",
    "row_weights": "lengths given counted by_length length factor =y",
    "log_deviation": "x begin end mask quantile floor positive =y =statistics threads",
    "score_bounds": "score low high widen =below =above threads",
    "score_factor": "score log_probs reference advantages begin end low_bound high_bound low high widen strength "
    "clamp_low clamp_high =y threads",
    "baseline": "log_probs squares rewards begin end mask group groups epsilon =advantages =returns threads",
}


def names(op):
    return [name.lstrip("=") for name in SIGNATURES[op].split()]


def results(op):
    return [name[1:] for name in SIGNATURES[op].split() if name[0] == "="]


def copied(arguments):
    """Copies that share memory where the originals do."""
    copies = {}

    def copy(x):
        if isinstance(x, list):
            return [copy(y) for y in x]
        if not isinstance(x, torch.Tensor):
            return x
        return copies.setdefault((x.data_ptr(), x.shape, x.dtype), x.clone())

    return [copy(x) for x in arguments]


def tensors(arguments):
    """The tensors among arguments, those in lists included."""
    every = [y for x in arguments for y in (x if isinstance(x, list) else [x])]
    return [x for x in every if isinstance(x, torch.Tensor)]


def poison(op, arguments, value):
    """Fills results, except those that are inputs too: what an operation fails to write then differs."""
    named = dict(zip(names(op), arguments, strict=True))
    inputs = {x.data_ptr() for x in tensors([x for name, x in named.items() if name not in results(op)])}
    for name in results(op):
        x = named[name]
        if x is not None and x.data_ptr() not in inputs:
            x.view(torch.uint8).fill_(value) if x.dim() else x.fill_(value)


def differences(op, arguments, ours, expected):
    """One line per result that differs: integers and bools exactly, floats to the digits of the inputs' dtype."""
    read = [x for name, x in zip(names(op), arguments, strict=True) if name not in results(op)]
    floats = [x for x in tensors(read) if x.is_floating_point()]
    double = all(x.dtype == torch.float64 for x in floats)
    for name, a, b in zip(names(op), ours, expected, strict=True):
        if name not in results(op) or a is None:
            continue
        if not a.is_floating_point():
            if not torch.equal(a, b):
                yield f"{op}: {name}: {(a != b).sum().item()} of {a.numel()} differ"
            continue
        scale = max((x.double().nan_to_num(0, 0, 0).abs().max().item() for x in [*floats, b] if x.numel()), default=1)
        relative = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(a.dtype, 1e-10 if double else 3e-5)
        x, y = a.double(), b.double()
        same = torch.isclose(x, y, relative, relative / 10 * scale, equal_nan=True)
        if not same.all():
            worst = (x - y).abs().nan_to_num(torch.inf).where(~same, 0).argmax()
            found = f"{x.view(-1)[worst]:.9g} instead of {y.view(-1)[worst]:.9g} at {worst}"
            yield f"{op}: {name}: {(~same).sum().item()} of {a.numel()} differ, {found}"


def run_both(op, emulated, host, arguments):
    """Runs the kernels on the arguments and the CPU's code on copies; returns what differs.

    What the CPU refuses (a token outside the vocabulary) the kernels answer with NaN, without waiting: not compared.
    """
    before = copied(arguments)
    poison(op, arguments, 0xFF)
    emulated(*arguments)
    poison(op, before, 0x5A)
    inputs = copied(before)
    try:
        host(*before)
    except ValueError:
        return []
    return list(differences(op, inputs, arguments, before))
