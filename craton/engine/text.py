"""An answer's tokens as text that is safe to show: whole characters, and nothing that may yet be a stop text."""

from tokenizers.decoders import DecodeStream

from craton.engine.request import Sampling
from craton.text.fields import may_begin
from craton.text.tokenizer import Tokenizer


class TextStream:
    """One answer's text, as it grows."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], sampling: Sampling):
        """prompt: ids that the answer follows."""
        self.tokenizer, self.sampling = tokenizer, sampling
        # The tokens that the answer is read after, so that its first space is not lost.
        last = [t for t in prompt[-6:] if t not in tokenizer.special_ids]
        self.before = last if tokenizer.drops_first_space else []
        self.decoder = DecodeStream(ids=self.before, skip_special_tokens=False)
        self.hidden = tokenizer.special_ids.difference(sampling.show_special)
        self.token_ids: list[int] = []
        self.text = ""  # that was given
        self.held = ""  # that may yet turn out to begin a stop text

    def feed(self, tokens: list[int], *, last: bool, thinking: bool) -> tuple[str, str | None]:
        """New text of the answer, and the stop text that ended it. last: no token comes after these. thinking: no stop
        text counts yet."""
        self.token_ids += tokens
        new = self._decoded(tokens)
        if last:
            new += self._unfinished(new)
        text = self.held + new
        searched = self._searched(text, thinking)
        found = min(((at, s) for s in searched if (at := text.find(s)) >= 0), default=None)
        if found is not None:
            text, self.held = text[: found[0]], ""
        else:
            keep = 0 if last else max((may_begin(text, stop) for stop in searched), default=0)
            text, self.held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += text
        return text, found[1] if found else None

    def _decoded(self, tokens: list[int]) -> str:
        new = ""
        for token in tokens:
            if token in self.hidden:
                continue
            try:
                new += self.decoder.step(self.tokenizer.backend, token) or ""
            except Exception:  # the library gives up on some sequences of single bytes; go on after them
                self.decoder = DecodeStream(skip_special_tokens=False)
        return new

    def _unfinished(self, new: str) -> str:
        """What a character that was cut off decodes to."""
        decode = self.tokenizer.backend.decode
        shown = [t for t in self.token_ids if t not in self.hidden]
        whole = decode([*self.before, *shown], skip_special_tokens=False)
        whole = whole.removeprefix(decode(self.before, skip_special_tokens=False))
        sent = self.text + self.held + new
        return whole[len(sent) :] if whole.startswith(sent) else ""

    def _searched(self, text: str, thinking: bool) -> tuple[str, ...]:
        """The stop texts that count now."""
        s = self.sampling
        if not s.stop or thinking or len(self.token_ids) < s.min_tokens:
            return ()
        whole = self.text + text
        if (s.stop_before and s.stop_before in whole) or s.stop_after not in whole:
            return ()
        return s.stop
