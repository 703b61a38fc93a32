"""The types of what users get: outputs, parts of outputs, and log-probabilities of tokens."""

from __future__ import annotations

from typing import Any

from utils.errors import did_you_mean


class Output(dict[str, Any]):
    """A dictionary whose entries are attributes as well: `out.text` is `out["text"]`.

    No entry has the name of a method of dictionaries, such as `items`.
    """

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            # `copy` and `pickle` look for such names, so the error suggests no entry.
            fix = "" if name.startswith("__") else f". {did_you_mean(name, self)}"
            raise AttributeError(f"this output has no entry {name!r}{fix}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(dict, name):
            raise AttributeError(f"{name!r} is a method of dictionaries, and no entry")
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(f"this output has no entry {name!r}") from None

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self]

    def copy(self) -> Output:
        """Return a shallow copy."""
        return Output(self)


class Logprob(float):
    """A log-probability: a float that also knows the token's rank and text.

    Attributes:
        rank: number of tokens with a higher log-probability, plus 1. None if it was not counted.
        decoded_token: text of the token, or the name of a special token. None without a tokenizer.
    """

    __slots__ = ("decoded_token", "rank")

    rank: int | None
    decoded_token: str | None

    def __new__(
        cls, logprob: float, rank: int | None = None, decoded_token: str | None = None
    ) -> Logprob:
        self = super().__new__(cls, logprob)
        self.rank, self.decoded_token = rank, decoded_token
        return self

    @property
    def logprob(self) -> float:
        """The log-probability as a plain float."""
        return float(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return Logprob, (self.logprob, self.rank, self.decoded_token)

    def __repr__(self) -> str:
        values = f"rank={self.rank}, decoded_token={self.decoded_token!r}"
        return f"Logprob(logprob={self.logprob!r}, {values})"
