"""Methods that score once and cut once: a criterion with a name."""

from __future__ import annotations

from typing import ClassVar

from secateur.errors import InputError
from secateur.importance import Criterion
from secateur.methods.base import Decision, Method, PruningTask, TextRead


class OneShot(Method):
    """A criterion as a method. The criterion's fields are the method's settings."""

    settings: Criterion
    criterion: ClassVar[type[Criterion]]

    @property
    def ranks(self) -> bool:
        """See ``Method.ranks``."""
        return True

    @property
    def reading(self) -> TextRead:
        """See ``Method.reading``."""
        return TextRead.by([self.settings])

    def run(self, task: PruningTask) -> Decision:
        """See ``Method.run``."""
        self.check(task)
        scores = task.score(self.settings)
        return Decision(task.allocate(scores), scores)

    def check(self, task: PruningTask) -> None:
        """See ``Method.check``: the criterion can read every group."""
        super().check(task)
        self.settings.check(task.model, task.restricted)


def one_shot(name: str, criterion: type[Criterion]) -> type[OneShot]:
    """The method ``name``, which removes the units with the lowest scores of ``criterion``.

    Raises InputError for a criterion that reads adapters.
    """
    if criterion.needs == "adapters":
        raise InputError(f"{name} reads adapters, and a one-shot method does not train any. Use it in method.saliency.")
    return type(
        criterion.__name__,
        (OneShot,),
        {
            "__doc__": criterion.__doc__,
            "__module__": criterion.__module__,
            "name": name,
            "summary": f"one shot: {criterion.summary}",
            "paper": criterion.paper,
            "needs": "nothing" if criterion.needs == "nothing" else "text",
            "kinds": criterion.kinds,
            "criterion": criterion,
            "Settings": criterion,
        },
    )
