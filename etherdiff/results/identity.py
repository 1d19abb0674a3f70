"""Whether scores of many runs may be averaged and stand beside each other: the rules of `compare` and of `eval.combine`.

Scores of one subject must have been computed alike in everything, as in `compare`; scores of different subjects in everything
but the subjects' own images and prompts, as in `combine_subjects`. Other libraries' versions are only told.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from etherdiff.runs.result import SUBJECTS_OWN, score_differences, version_differences
from etherdiff.runs.run import Run
from etherdiff.system.errors import UserError
from etherdiff.system.text import listed


@dataclass
class Checked:
    """What was found of scores that were to be computed alike."""

    otherwise: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    """Folder of a run, score -> how it was computed otherwise than the first run's."""
    rounding: list[str] = field(default_factory=list)
    """Libraries whose versions differ, a sentence each."""

    def is_otherwise(self, runs: Sequence[Run], score: str) -> bool:
        """Whether one of the runs' scores was computed otherwise."""
        return any((str(run.folder.path), score) in self.otherwise for run in runs)

    def sentences(self) -> list[str]:
        """What differs, with the runs and the scores that it concerns."""
        found: dict[str, dict[str, list[str]]] = {}
        for (run, score), differences in self.otherwise.items():
            for difference in differences:
                found.setdefault(difference, {}).setdefault(score, []).append(run)
        sentences = []
        for difference, scores in found.items():
            runs = list(dict.fromkeys(run for of in scores.values() for run in of))
            verb = "was" if len(runs) == 1 else "were"
            sentences.append(f"{listed(runs)} {verb} not scored as the first run was: {difference} ({', '.join(scores)})")
        return sentences


def check_identities(runs: Sequence[Run], scores: Sequence[str], anyway: bool) -> Checked:
    """Hold every run's scores against the first's. UserError where they differ, unless `anyway`."""
    checked = Checked()
    for score in scores:
        with_it = [run for run in runs if score in run.scores]
        first: dict[str, Run] = {}
        for run in with_it:
            own = first.setdefault(run.subject_name, run)
            one, other, wholly_first = own.scores[score], run.scores[score], with_it[0].scores[score]
            found = score_differences(one, other) or score_differences(wholly_first, other, SUBJECTS_OWN)
            if found:
                checked.otherwise[str(run.folder.path), score] = found
            for name, version, before in version_differences(with_it[0].scores[score], run.scores[score]):
                text = f"{name} {version} and {before}, which may change the last digits"
                if text not in checked.rounding:
                    checked.rounding.append(text)
    if checked.otherwise and not anyway:
        advice = "score them alike (etherdiff eval), or pass --anyway to see them together, marked"
        raise UserError([*checked.sentences(), advice])
    return checked
