"""A sampler that does not depend on what a model says, and rewards for its responses."""

import zlib

import torch
from tokcredit import Rollouts
from tokcredit.train.sampler import Completions
from tokcredit.train.scoring import left_padded, score


def digest(prompt, response, answer):
    """A reward that differs between different responses, whatever the model says."""
    return zlib.crc32(response.encode()) / 2**32


def digits(prompt, response, answer):
    """The share of digits in the response."""
    return sum(c.isdigit() for c in response) / max(len(response), 1)


class UniformSampler:
    """Samples uniformly over the vocabulary, with the log-probs that the trained model gives the tokens.

    It draws integers from torch's generator, which are the same on every processor and do not depend on the model.
    Lengths are uniform up to twice the limit: half of the rows are cut there, unless ``endless``, which cuts all.
    """

    endless = False

    def __init__(self, model, tokenizer, dtype=None, batch=256, adaptive=None):
        self.model, self.words, self.device = model, tokenizer, torch.device("cpu")

    def sync(self):
        pass

    def sample(self, prompts, count, max_tokens, temperature, stop=()):
        rows, finished = [], []
        for prompt in prompts:
            generator = None if temperature else torch.Generator().manual_seed(sum(prompt))
            for _ in range(count):
                length = 2 * max_tokens
                if not self.endless:
                    length = int(torch.randint(1, 2 * max_tokens + 1, (), generator=generator))
                row = torch.randint(3, len(self.words), (length,), generator=generator).tolist()
                row[-1] = self.words.eos_token_id
                ends = [n for n in range(1, length + 1) if stop and self.words.decode(row[:n]).endswith(tuple(stop))]
                row = row[: min([max_tokens, *ends])]
                rows.append(row)
                finished.append(row[-1] == self.words.eos_token_id or len(row) in ends)
        edges = torch.tensor([0, *map(len, rows)]).cumsum(0)
        tokens = torch.tensor([t for row in rows for t in row])
        log_probs = torch.zeros(len(tokens))
        if temperature:
            repeated = [prompt for prompt in prompts for _ in range(count)]
            log_probs = scored(self.model, repeated, tokens, edges, temperature)
        return Completions(tokens, edges, log_probs, torch.tensor(finished))


@torch.no_grad()
def scored(model, prompts, tokens, edges, temperature=1.0):
    """Log-probs of rows after their prompts, float32 ``[N]``."""
    rows = len(prompts)
    extras = {"prompt_tokens": left_padded(prompts, -1, torch.device("cpu"))[0]}
    batch = Rollouts(tokens, edges, torch.zeros(rows, dtype=torch.int64), torch.zeros(rows), extras=extras)
    return score(model, batch, temperature)[0].float()
