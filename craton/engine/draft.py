"""Guesses at the next tokens, which one forward pass then checks (arXiv 2211.17192).

A guess counts if it is the very token that sampling gives there, with the random number of its position: the answer is
the same token for token as without guessing, so its distribution is too.
"""


class PromptLookup:
    """Guesses that what followed the last words before follows again (arXiv 2304.04487). One for an answer."""

    def __init__(self, most: int = 8, longest: int = 3):
        self.most, self.longest = most, longest
        self.after: dict[tuple[int, ...], int] = {}  # the place after the last occurrence of some tokens
        self.seen = 0

    def guess(self, tokens: list[int]) -> list[int]:
        """Tokens that may come after these."""
        for end in range(max(self.seen, 1), len(tokens)):  # what ends before the last token
            for n in range(1, self.longest + 1):
                if end >= n:
                    self.after[tuple(tokens[end - n : end])] = end
        self.seen = len(tokens)
        for n in range(min(self.longest, len(tokens) - 1), 0, -1):
            at = self.after.get(tuple(tokens[-n:]))
            if at is not None:
                return tokens[at : at + self.most]
        return []
