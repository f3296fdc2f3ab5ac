"""An environment for the tests of episodes, which imports only what an environment may import."""

import os

from tokcredit.environments import Observation


class Corridor:
    """Cells in a row; each step right has a reward, and the last cell ends the episode. ``trouble`` is an action."""

    introduction = "Walk to the right."

    def __init__(self, cells=4, trouble="raise"):
        self.cells, self.trouble, self.at = cells, trouble, 0

    def reset(self, seed):
        self.at = self.begun = seed % 2
        self.seed = seed
        return self.seen("begin")

    def seen(self, said, reward=0.0):
        done = self.at == self.cells - 1
        return Observation(f"{said} {self.at}", f"{self.seed}: {self.at}", reward, done, self.at / (self.cells - 1))

    def step(self, action):
        action = action.strip()
        if action == "trouble":
            if self.trouble == "hang":
                while True:
                    pass
            if self.trouble == "exit":
                os._exit(1)
            return {"raise": {}.pop, "text": str, "nan": lambda x: Observation(x, x, float("nan"))}[self.trouble]("x")
        if action == "left" and self.at > 0:
            self.at -= 1
            return self.seen("left", -0.125)
        if action == "right":
            self.at += 1
            done = self.at == self.cells - 1
            return self.seen("right", 1.0 if done else 0.25)
        return self.seen("no")
